"""The paper's twelve benchmarks (`vismem.data.benchmarks`), asked as they are: a trained memory, no splits of its own.

A benchmark that cannot be scored says why, and the others go on.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vismem.config import Config, LmuDataSource
from vismem.data.answer_forms import answer_form, reference_value
from vismem.data.benchmarks import BENCHMARKS, Benchmark, counted
from vismem.data.clusters import cluster_ids
from vismem.data.fingerprint import image_cache
from vismem.data.instructions import instructed, instruction_for
from vismem.data.readers import lmudata
from vismem.data.sample import Sample, StoredSamples, write_shards
from vismem.errors import UserError
from vismem.evaluation import plots
from vismem.evaluation.answers import UNPARSED
from vismem.evaluation.arms import resolve_arms
from vismem.evaluation.benchmarks import score_of
from vismem.evaluation.decoding import Run, decode
from vismem.evaluation.evaluate import load_models, measure, pick, pictures_of, write
from vismem.evaluation.judge import Judge
from vismem.evaluation.predictions import Prediction, predict
from vismem.evaluation.summary import headline
from vismem.files import write_json
from vismem.generation.types import Rollout
from vismem.provenance import sha256_folder
from vismem.records import VANILLA, VISMEM

STORE = "suite_store"  # beside the output: answers, verdicts, and while a suite is asked its questions


@dataclass
class Asked:
    """A benchmark's questions, and what became of them. `why` says why it is not scored; empty where it is."""

    benchmark: Benchmark
    why: str = ""
    left_out: Counter[str] = field(default_factory=Counter)  # rows of its file by reason
    samples: Sequence[Sample] = ()
    runs: Mapping[str, Run] = field(default_factory=dict)  # by arm
    predictions: Mapping[str, list[Prediction]] = field(default_factory=dict)

    def row(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Its row of `suite.json`; `found`: its figures of `by_benchmark`, empty where it is not scored."""
        own, scores = self.benchmark, {arm: score_of(found, arm) for arm in found.get("arms", ())}
        paper = {VANILLA: own.vanilla, VISMEM: own.vismem}
        said = {"name": own.name, "capability": own.capability.value, "score": own.score, "why": self.why}
        return said | {"n": found.get("n", 0), "left_out": self.left_out, "scores": scores, "paper": paper}


def suite(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """The step `suite`: ask every benchmark whose file is there; write what `evaluate` writes, and `suite.json`.

    Answers are kept beside `out`, by what they depend on: what has been answered is not asked again, arm by arm.
    UserError for arms of other models, and where no benchmark can be scored.
    """
    settings, arms, store = config.suite, resolve_arms(config.suite.arms), out.with_name(STORE)
    if others := [arm.name for arm in arms if arm.model != VISMEM]:
        raise UserError(f"suite.arms: {', '.join(others)} decodes another model: name arms of the trained memory")
    judge = Judge(settings.judge_url, settings.judge_model, store / "judge") if settings.judge_url else None
    files, accelerator = lmudata.folder_of(settings.data, "suite.data"), Accelerator(cpu=not torch.cuda.is_available())
    main = accelerator.is_main_process
    ready = [[_prepared(each, config, files, store / "data") for each in BENCHMARKS] if main else None]
    every: list[Asked] = broadcast_object_list(ready)[0]
    asked = _without_reason(every)
    models, model = load_models(arms, inputs, config), [sha256_folder(folder) for folder in inputs.values()]
    for one in asked:
        folder = store / "data" / one.benchmark.file
        one.samples = pick(folder, settings.limit, config.seed)
        decoding = config.evaluate.model_dump(include={"batch_size", "max_new_tokens"})
        made_of = json.dumps([*model, config.base.dtype, sha256_folder(folder), settings.limit, config.seed, decoding])
        kept = store / f"{one.benchmark.file}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
        kept.mkdir(parents=True, exist_ok=True)
        one.runs = decode(models, arms, one.samples, config, kept, accelerator, one.benchmark.name)
    if not main:
        return ""
    clusters = iter(cluster_ids(chain.from_iterable(one.samples for one in asked)))
    for one in asked:
        own = [next(clusters) for _ in one.samples]
        try:
            one.predictions = {arm: _predictions(one, run.rollouts, own, judge) for arm, run in one.runs.items()}
        except UserError as error:
            one.why = f"not scored: {error}; its answers are kept"
    line = _write(config, inputs, out, every)
    shutil.rmtree(store / "data")
    return line


def _without_reason(every: Sequence[Asked]) -> list[Asked]:
    """The benchmarks that have no reason not to be scored. UserError, with all reasons, where there are none."""
    if not (scored := [one for one in every if not one.why]):
        raise UserError("\n".join(["no benchmark can be scored:", *(f"{o.benchmark.name}: {o.why}" for o in every)]))
    return scored


def _prepared(benchmark: Benchmark, config: Config, files: Path, data: Path) -> Asked:
    """Write a benchmark's questions to `data`/FILE, as shards."""
    one, folder = Asked(benchmark), data / benchmark.file
    if benchmark.unsupported:
        return replace(one, why=f"not supported: {benchmark.unsupported}")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    try:
        write_shards(_questions(one, config, files), folder)
    except UserError as error:
        return replace(one, why=f"not asked: {error}")
    if not len(StoredSamples(folder)):
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in one.left_out.items())
        one.why = f"not asked: {reasons or 'its file has no rows'}"
    return one


def _questions(one: Asked, config: Config, files: Path) -> Iterator[Sample]:
    """The questions with their instruction; rows that cannot be asked or scored are counted in `one.left_out`."""
    benchmark, examine, seen = one.benchmark, image_cache(), set[str]()
    source = LmuDataSource(kind="lmudata", name=benchmark.file, path=files, split="test")
    for sample in lmudata.read(source, judged=True):
        form = answer_form(sample.question, sample.answer, sample.choices)
        faults = {
            f"part {sample.part}": not counted(sample),
            "an index that is there before": sample.id in seen,
            "no image": not sample.images,
            "an image that cannot be read": any(examine(image).fault for image in sample.images),
            "no answer, or one that is no option": not (sample.answer and reference_value(form, sample.answer)),
            f"an answer of another kind ({form.kind})": form.kind not in benchmark.kinds,
        }
        seen.add(sample.id)
        if fault := next((reason for reason, is_so in faults.items() if is_so), None):
            one.left_out[fault] += 1
        elif instruction_for(form.kind, config.prepare.instructions) and not benchmark.judge:
            yield instructed(sample, config.prepare.instructions)
        else:
            prompt = benchmark.prompt if form.kind is benchmark.kinds[0] else ""
            yield replace(sample, question="\n".join(filter(None, (sample.question, prompt))))


def _predictions(one: Asked, rollouts: list[Rollout], own: list[str], judge: Judge | None) -> list[Prediction]:
    """Every answer scored as its benchmark does. UserError where it needs a judge, and that is not there."""
    answered = list(zip(one.samples, rollouts, own, strict=True))
    if not one.benchmark.judge:
        return [predict(*answer) for answer in answered]
    if judge is None:
        raise UserError("a judge model scores it: name one with suite.judge_url and suite.judge_model")
    found = [predict(*answer) for answer in answered]
    scores = judge.scores(one.benchmark.judge, [(p.question, p.reference, p.text) for p in found])
    return [
        replace(p, score=s or 0.0, extracted=None if s is None else f"{s:g}", rule=UNPARSED if s is None else "judge")
        for p, s in zip(found, scores, strict=True)
    ]


def _write(config: Config, inputs: Mapping[str, Path], out: Path, every: Sequence[Asked]) -> str:
    """Write what `evaluate` writes of the benchmarks that are scored, and `suite.json` of all; return it as text."""
    scored = _without_reason(every)
    predictions = {arm: [p for one in scored for p in one.predictions[arm]] for arm in config.suite.arms}
    seconds = {arm: sum(one.runs[arm].seconds for one in scored) for arm in predictions}
    metrics = measure(config, inputs, predictions, seconds, sha256_folder(out.with_name(STORE) / "data"))
    rows = [one.row({} if one.why else metrics.benchmarks[one.benchmark.file].model_dump()) for one in every]
    means = {arm: sum(row["paper"][arm] for row in rows if row["scores"]) / len(scored) for arm in (VANILLA, VISMEM)}
    mean = {"name": "mean of those scored", "capability": "", "score": "", "why": "", "n": metrics.n, "left_out": {}}
    rows.append(mean | {"scores": metrics.macro, "paper": means})
    charts = plots.evaluation_charts(metrics, predictions, plots.read_curves(inputs["stage2"]))
    pictures = pictures_of([one.samples for one in scored], predictions[VANILLA])
    judge = f"{config.suite.judge_model or 'none'} {config.suite.judge_url}"
    sources = {"base model": str(inputs["base"]), "test data (sha256)": metrics.test_sha256, "judge": judge}
    write(config, out, predictions, metrics, charts, pictures, sources, suite=rows)
    write_json(out / "suite.json", rows)
    return "\n".join([headline(metrics), *(f"{row['name']}: {row['why'] or _beside(row)}" for row in rows)])


def _beside(row: Mapping[str, Any]) -> str:
    """The arms' scores, the paper's in brackets."""
    paper = {arm: f" (paper {score:.1f})" for arm, score in row["paper"].items()}
    return ", ".join(f"{arm} {score:.1f}{paper.get(arm, '')}" for arm, score in row["scores"].items())
