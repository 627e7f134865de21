"""The step `evaluate`: every arm answers the same test questions; tables, metrics, plots and a report come out."""

import hashlib
import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter

from vismem.config import Config
from vismem.data.clusters import cluster_ids
from vismem.data.sample import Sample, iterate_samples
from vismem.errors import UserError
from vismem.evaluation import plots, report
from vismem.evaluation.arms import Arm, label, resolve_arms
from vismem.evaluation.metrics import summarise
from vismem.evaluation.predictions import Prediction, predict, predictions_file, write_predictions
from vismem.evaluation.summary import headline, headline_figures
from vismem.files import empty_folder, write_json, write_text
from vismem.generation.engine import generate
from vismem.generation.types import Rollout
from vismem.models.variants import load_variant
from vismem.models.vismem import VisMemModel, load_base
from vismem.progress import progress
from vismem.provenance import git_state, sha256_file, sha256_folder, versions
from vismem.records import VISMEM, Metrics

WARM_UP = 8  # items that every arm answers once, untimed, before the first timed batch
ANSWERS, KEEP_EVERY = "answers.checkpoint", 30.0  # seconds: after a kill, no more is answered again


def evaluate(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write predictions, `metrics.json`, `scores.json`, `plots/` and `report.html`; return the result in a sentence.

    `inputs` holds the folder of every baseline that an arm decodes. UserError for an unknown arm, an arm whose model is
    not there, a test split without rows, or a model that cannot be loaded.
    """
    arms, folder = resolve_arms(config.evaluate.arms), inputs["validate"] / "data" / "test"
    samples = pick(folder, config.evaluate.limit, config.seed)
    clusters = cluster_ids(samples)
    models = load_models(arms, inputs, config)
    decoded = decode(models, arms, samples, config, out / ANSWERS)
    predictions = {
        name: [predict(*answered) for answered in zip(samples, run.rollouts, clusters, strict=True)]
        for name, run in decoded.items()
    }
    seconds = {name: run.seconds / len(samples) for name, run in decoded.items()}
    metrics = Metrics(
        **summarise(predictions, seconds, seed=config.seed, resamples=config.evaluate.bootstrap),
        stage2_sha256=sha256_folder(inputs["stage2"]),
        test_sha256=sha256_folder(folder, "*.parquet"),
        items_sha256=hashlib.sha256("\n".join(sample.id for sample in samples).encode()).hexdigest(),
    )
    sources = {
        "base model": config.base.model,
        "memory (sha256)": sha256_file(inputs["stage2"] / "memory.safetensors"),
        **{
            f"{label(name)} (sha256)": sha256_folder(inputs[name], "*.safetensors") for name in models if name != VISMEM
        },
        "test data (sha256)": metrics.test_sha256,
        "device": str(next(iter(models.values())).backbone.device),
    }
    pictures = {s.id: (*s.images, *(video.frames[0] for video in s.videos)) for s in samples}
    charts = plots.evaluation_charts(metrics, predictions, plots.read_curves(inputs["stage2"]))
    write(config, out, predictions, metrics, charts, pictures, sources)
    return headline(metrics)


def pick(folder: Path, limit: int | None, seed: int) -> list[Sample]:
    """The split's samples in order; with `limit`, that many drawn at random (a head could be all of one task)."""
    try:
        count = sum(pq.ParquetFile(shard).metadata.num_rows for shard in folder.glob("part-*.parquet"))
        if count == 0:
            raise UserError(f"the test split in {folder} has no rows: nothing to evaluate; check `prepare.sources`")
        drawn = range(count) if limit is None else random.Random(seed).sample(range(count), min(limit, count))
        chosen = set(drawn)
        return [sample for place, sample in enumerate(iterate_samples(folder)) if place in chosen]
    except (OSError, ValueError) as error:  # a damaged shard, a wrong column
        raise UserError(f"the test split in {folder} cannot be read: {error}; run `vismem validate` again") from error


def load_models(arms: Sequence[Arm], inputs: Mapping[str, Path], config: Config) -> dict[str, VisMemModel]:
    """The models that the arms decode, by `Arm.model`; each holds a base of its own in memory.

    A baseline's folder lays an adapter over the base, or (full fine-tuning) is a base itself.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: dict[str, VisMemModel] = {}
    for arm in arms:
        if arm.model in models:
            continue
        folder = inputs.get("stage2" if arm.model == VISMEM else arm.model)
        if folder is None:
            raise UserError(
                f"evaluate.arms: '{arm.name}' decodes the model of '{arm.model}', which is not there: "
                f"run `vismem {arm.model}` first, or leave the arm out"
            )
        if (folder / "vismem.json").is_file():
            model = load_variant(folder, inputs["base"], config.base.dtype)
        else:
            model = VisMemModel(load_base(folder, config.base.dtype), config.memory, config.invocation)
        model.backbone.model.to(device)
        models[arm.model] = model.to(device)
    return models


@dataclass
class Run:
    """One arm's answers so far, in the order of the samples, and the seconds spent decoding them."""

    rollouts: list[Rollout] = field(default_factory=list)
    seconds: float = 0.0


_RUNS = TypeAdapter(dict[str, Run])


def decode(
    models: Mapping[str, VisMemModel],
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    config: Config,
    kept: Path | None = None,
) -> dict[str, Run]:
    """Answer `samples` greedily with every arm, each by its model of `models`. Only decoding is timed.

    The arms take turns batch by batch, each round in another order, so that a drifting machine hits all alike. Answers
    so far go to the file `kept` from time to time, and are read from there: a killed run resumes behind them.
    """
    runs = _RUNS.validate_json(kept.read_bytes()) if kept and kept.is_file() else {arm.name: Run() for arm in arms}
    answered, saved = len(runs[arms[0].name].rollouts), time.monotonic()
    for arm in arms:
        _answer(models[arm.model], arm, samples[:WARM_UP], config)
    count = math.ceil(len(samples) / config.evaluate.batch_size)
    ends = [len(samples) * turn // count for turn in range(count + 1)]  # of one size, so that none is left alone
    with progress("evaluate", len(samples) * len(arms), answered * len(arms)) as advance:
        for turn, (start, end) in enumerate(itertools.pairwise(ends)):
            if start < answered:
                continue
            shift = turn % len(arms)
            for arm in [*arms[shift:], *arms[:shift]]:
                started = time.perf_counter()
                rollouts = _answer(models[arm.model], arm, samples[start:end], config)
                runs[arm.name].seconds += time.perf_counter() - started
                runs[arm.name].rollouts += rollouts
                advance(end - start, arm=arm.label)
            if kept and time.monotonic() - saved >= KEEP_EVERY:
                write_text(kept, _RUNS.dump_json(runs).decode())
                saved = time.monotonic()
    return runs


def write(
    config: Config,
    out: Path,
    predictions: Mapping[str, Sequence[Prediction]],
    metrics: Metrics,
    charts: Mapping[str, Sequence[plots.Panel]],
    pictures: Mapping[str, Sequence[bytes]],
    sources: Mapping[str, str],
) -> None:
    """Write all files of the step into `out`; leftovers of a killed run go."""
    empty_folder(out)
    for arm, answers in predictions.items():
        write_predictions(answers, predictions_file(out, arm))
    metrics.write(out)
    write_json(out / "scores.json", headline_figures(metrics))
    plots.write_plots(charts, metrics, predictions, out / "plots")
    git = git_state()
    provenance = {
        **sources,
        "test questions": str(metrics.n),
        "seed": str(metrics.seed),
        "git commit": f"{git['commit'] or 'unknown'}{', with uncommitted changes' if git['dirty'] else ''}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    write_text(out / "report.html", report.render(metrics, predictions, charts, pictures, provenance, config.evaluate))


def _answer(model: VisMemModel, arm: Arm, samples: Sequence[Sample], config: Config) -> list[Rollout]:
    with model.reference() if arm.base else nullcontext():
        return generate(
            model, samples, arm.policy, max_new_tokens=config.evaluate.max_new_tokens, temperature=0.0, seed=config.seed
        )
