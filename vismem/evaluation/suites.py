"""The paper's twelve benchmarks (`vismem.data.benchmarks`), asked as they are: a trained memory, no splits of its own.

A benchmark that cannot be scored says why, and the others go on.
"""

import ast
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vismem.config import Config, LmuDataSource
from vismem.data.answer_forms import answer_form, reference_value
from vismem.data.benchmarks import BENCHMARKS, Benchmark, counted
from vismem.data.clusters import cluster_ids
from vismem.data.fingerprint import image_cache
from vismem.data.instructions import instructed, instruction_for
from vismem.data.readers import lmudata, mv_math
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.evaluation import plots
from vismem.evaluation.answers import UNPARSED
from vismem.evaluation.arms import Arm, resolve_arms
from vismem.evaluation.benchmarks import score_of
from vismem.evaluation.evaluate import Pictures, Run, decode, load_models, pick, write
from vismem.evaluation.judge import Judge
from vismem.evaluation.metrics import summarise
from vismem.evaluation.predictions import Prediction, predict
from vismem.evaluation.suite_scores import Suite, SuiteBenchmark
from vismem.evaluation.summary import headline
from vismem.generation.types import Rollout
from vismem.provenance import sha256_folder
from vismem.records import VANILLA, VISMEM, Metrics

STORE = "suite_store"  # beside the output: answers, verdicts, and while a suite is asked its questions


@dataclass
class Asked:
    """A benchmark's questions, and what became of them. `why` says why it is not scored; empty where it is."""

    benchmark: Benchmark
    why: str
    left_out: dict[str, int]  # rows by reason
    samples: Sequence[Sample] = ()
    runs: Mapping[str, Run] = field(default_factory=dict)
    predictions: Mapping[str, list[Prediction]] = field(default_factory=dict)


def suite(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """The step `suite`: ask every benchmark whose file is there; write what `evaluate` writes, and `suite.json`.

    Answers are kept beside `out`, by what they depend on: what has been answered is not asked again, arm by arm.
    UserError for arms of other models, and where no benchmark can be scored.
    """
    arms = resolve_arms(config.suite.arms)
    if others := [arm.name for arm in arms if arm.model != VISMEM]:
        raise UserError(f"suite.arms: {', '.join(others)} decodes another model: name arms of the trained memory")
    accelerator, store = Accelerator(cpu=not torch.cuda.is_available()), out.with_name(STORE)
    files = lmudata.folder_of(config.suite.data, "suite.data")
    main = accelerator.is_main_process
    ready = [[_prepared(b, config, files, store / "data") for b in BENCHMARKS]] if main else [None]
    every = [Asked(*one) for one in broadcast_object_list(ready)[0] or ()]
    if not (asked := [one for one in every if not one.why]):
        raise UserError("no benchmark can be asked:\n" + "\n".join(f"{one.benchmark.name}: {one.why}" for one in every))
    models = load_models(arms, inputs, config)
    model = "".join(map(sha256_folder, inputs.values()))
    for one in asked:
        folder = store / "data" / one.benchmark.file
        one.samples = pick(folder, config.suite.limit, config.seed)
        settings = config.evaluate.model_dump(include={"batch_size", "max_new_tokens"})
        made_of = [model, sha256_folder(folder), config.suite.limit, config.seed, settings]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        kept = store / f"{one.benchmark.file}-{key}"
        kept.mkdir(parents=True, exist_ok=True)
        one.runs = decode(models, arms, one.samples, config, kept, accelerator, one.benchmark.name)
    if not main:
        return ""
    clusters = iter(cluster_ids(chain.from_iterable(one.samples for one in asked)))
    judge = Judge(config.suite.judge_url, config.suite.judge_model, store / "judge") if config.suite.judge_url else None
    for one in asked:
        own = [next(clusters) for _ in one.samples]
        try:
            one.predictions = {arm: _predictions(one, run.rollouts, own, judge) for arm, run in one.runs.items()}
        except UserError as error:
            one.why = f"not scored: {error}; its answers are kept"
    line = _write(config, inputs, out, every, arms)
    shutil.rmtree(store / "data")
    return line


def _prepared(benchmark: Benchmark, config: Config, files: Path, data: Path) -> tuple[Benchmark, str, dict[str, int]]:
    """Write a benchmark's questions to `data`/FILE as shards: why it cannot be asked, and rows left out by reason."""
    folder, left_out = data / benchmark.file, Counter[str]()
    if benchmark.unsupported:
        return benchmark, f"not supported: {benchmark.unsupported}", {}
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    try:
        write_shards(_questions(benchmark, config, files, left_out), folder)
        pick(folder, None, 0)
    except UserError as error:
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in left_out.items())
        return benchmark, f"not asked: {reasons or error}", dict(left_out)
    return benchmark, "", dict(left_out)


def _questions(benchmark: Benchmark, config: Config, files: Path, left_out: Counter[str]) -> Iterator[Sample]:
    """Its questions with their instruction; rows that cannot be asked or scored are counted in `left_out`."""
    examine = image_cache()
    source = LmuDataSource(kind="lmudata", name=benchmark.file, path=files, split="test")
    of_lmudata = benchmark.file != mv_math.FOLDER
    rows = lmudata.every_row(source) if of_lmudata else mv_math.read(files / mv_math.FOLDER)
    for sample in rows:
        form = answer_form(sample.question, sample.answer, sample.choices)
        faults = {
            f"part {sample.part}": not counted(sample),
            "no image": not sample.images,
            "an image that cannot be read": any(examine(image).fault for image in sample.images),
            "no answer": not sample.answer,
            "a reference that is none of the options": reference_value(form, sample.answer) is None,
            f"an answer of another kind ({form.kind})": form.kind not in benchmark.kinds,
        }
        if fault := next((reason for reason, is_so in faults.items() if is_so), None):
            left_out[fault] += 1
        elif benchmark.judge:
            yield sample
        elif instruction_for(form.kind, config.prepare.instructions):
            yield instructed(sample, config.prepare.instructions)
        elif benchmark.prompt and form.kind is benchmark.kinds[0]:
            yield replace(sample, question=f"{sample.question}\n{benchmark.prompt}")
        else:
            yield sample


def _predictions(
    one: Asked, rollouts: Sequence[Rollout], clusters: Sequence[str], judge: Judge | None
) -> list[Prediction]:
    """Every answer scored as its benchmark does. UserError where it needs a judge, and that is not there."""
    answered = list(zip(one.samples, rollouts, clusters, strict=True))
    if not one.benchmark.judge:
        return [_best(one.benchmark, *answer) for answer in answered]
    if judge is None:
        raise UserError("a judge model scores it: name one with --judge and --judge-model")
    found = [predict(*answer) for answer in answered]
    scores = judge.scores(one.benchmark.judge, [(p.question, p.reference, p.text) for p in found])
    return [
        replace(p, score=s or 0.0, extracted=None if s is None else f"{s:g}", rule=UNPARSED if s is None else "judge")
        for p, s in zip(found, scores, strict=True)
    ]


def _best(benchmark: Benchmark, sample: Sample, rollout: Rollout, cluster: str) -> Prediction:
    """The answer scored by rules; where several references are right, by the one that it meets."""
    references = _listed(sample.answer) if benchmark.any_of else [sample.answer]
    scored = [predict(replace(sample, answer=one), rollout, cluster) for one in references]
    return replace(max(scored, key=lambda prediction: prediction.score), reference=sample.answer)


def _listed(answer: str) -> list[str]:
    """The entries of an answer that is a list literal; any other answer alone."""
    try:
        entries = ast.literal_eval(answer) if answer.startswith("[") else ()
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        entries = ()
    return [str(entry) for entry in entries] or [answer]


def _write(config: Config, inputs: Mapping[str, Path], out: Path, every: Sequence[Asked], arms: Sequence[Arm]) -> str:
    """Write what `evaluate` writes of the benchmarks that are scored, and `suite.json` of all; return it as text."""
    scored = [one for one in every if not one.why]
    if not scored:
        raise UserError("no benchmark is scored:\n" + "\n".join(f"{one.benchmark.name}: {one.why}" for one in every))
    predictions = {arm.name: [p for one in scored for p in one.predictions[arm.name]] for arm in arms}
    ids = [[p.id for p in one.predictions[VANILLA]] for one in scored]
    seconds = {arm.name: sum(one.runs[arm.name].seconds for one in scored) / sum(map(len, ids)) for arm in arms}
    apart = {
        one.benchmark.file: sum(n for why, n in one.left_out.items() if not why.startswith("part ")) for one in scored
    }
    figures = summarise(predictions, seconds, seed=config.seed, resamples=config.evaluate.bootstrap, set_apart=apart)
    items = "\n".join(chain.from_iterable(ids))
    metrics = Metrics(
        **figures,
        stage2_sha256=sha256_folder(inputs["stage2"]),
        test_sha256=sha256_folder(out.with_name(STORE) / "data"),
        items_sha256=hashlib.sha256(items.encode()).hexdigest(),
    )
    found = Suite(
        benchmarks={
            one.benchmark.name: SuiteBenchmark(
                capability=one.benchmark.capability.value,
                n=0 if one.why else figures["benchmarks"][one.benchmark.file]["n"],
                left_out=one.left_out,
                score=one.benchmark.score,
                scores={}
                if one.why
                else {a.name: score_of(figures["benchmarks"][one.benchmark.file], a.name) for a in arms},
                paper={VANILLA: one.benchmark.vanilla, VISMEM: one.benchmark.vismem},
                why=one.why,
            )
            for one in every
        },
        macro=metrics.macro,
    )
    charts = plots.evaluation_charts(metrics, predictions, plots.read_curves(inputs["stage2"]))
    pictures = Pictures(*((one.samples, own) for one, own in zip(scored, ids, strict=True)))
    judged = f"{config.suite.judge_model} at {config.suite.judge_url}" if config.suite.judge_url else "none"
    sources = {"base model": str(inputs["base"]), "test data (sha256)": metrics.test_sha256, "judge": judged}
    write(config, out, predictions, metrics, charts, pictures, sources, found)
    found.write(out)
    return "\n".join([headline(metrics), *found.lines()])
