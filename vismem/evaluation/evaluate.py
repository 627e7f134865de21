"""The step `evaluate`: every arm answers the same test questions; tables, metrics, plots and a report come out."""

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from vismem.config import Config
from vismem.data.clusters import cluster_ids
from vismem.data.sample import Sample, StoredSamples
from vismem.errors import UserError
from vismem.evaluation import plots, report
from vismem.evaluation.arms import Arm, label, resolve_arms
from vismem.evaluation.decoding import ANSWERS, decode
from vismem.evaluation.looks import find_looks
from vismem.evaluation.metrics import summarise
from vismem.evaluation.panels import Panel
from vismem.evaluation.predictions import Prediction, predict, predictions_file, write_predictions
from vismem.evaluation.summary import headline, headline_figures
from vismem.files import empty_folder, write_json, write_text
from vismem.models.attention import Look
from vismem.models.loading import load_base
from vismem.models.variants import load_variant
from vismem.models.vismem import VisMemModel
from vismem.provenance import git_state, sha256_file, sha256_folder, versions
from vismem.records import VANILLA, VISMEM, Metrics


def evaluate(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write predictions, `metrics.json`, `scores.json`, `plots/` and `report.html`; return the result in a sentence.

    `inputs` holds the folder of every baseline that an arm decodes. UserError for an unknown arm, an arm whose model is
    not there, a test split without rows, or a model that cannot be loaded.
    """
    arms, folder = resolve_arms(config.evaluate.arms), inputs["validate"] / "data" / "test"
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    samples = pick(folder, config.evaluate.limit, config.seed)
    models = load_models(arms, inputs, config)
    decoded = decode(models, arms, samples, config, out, accelerator)
    if not (accelerator.is_main_process or config.base.tensor_parallel):
        return ""
    predictions: dict[str, list[Prediction]] = {name: [] for name in decoded}
    for place, (sample, cluster) in enumerate(zip(samples, cluster_ids(samples), strict=True)):
        for name, run in decoded.items():
            predictions[name].append(predict(sample, run.rollouts[place], cluster))
    asked = {place: samples[place] for place in report.to_look_at(predictions, config.seed)}
    looks = find_looks(models[VISMEM], asked, decoded[VISMEM].rollouts, config) if asked else {}
    if not accelerator.is_main_process:
        return ""
    seconds, apart = {name: run.seconds for name, run in decoded.items()}, rows_set_apart(inputs["validate"])
    metrics = measure(config, inputs, predictions, seconds, sha256_folder(folder, "*.parquet"), apart)
    sources = {
        "base model": config.base.model,
        "memory (sha256)": sha256_file(inputs["stage2"] / "memory.safetensors"),
        **{
            f"{label(name)} (sha256)": sha256_folder(inputs[name], "*.safetensors") for name in models if name != VISMEM
        },
        "test data (sha256)": metrics.test_sha256,
        "device": str(next(iter(models.values())).backbone.device),
    }
    charts = plots.evaluation_charts(metrics, predictions, plots.read_curves(inputs["stage2"]))
    write(config, out, predictions, metrics, charts, pictures_of([samples], predictions[VANILLA]), sources, looks)
    return headline(metrics)


def pick(folder: Path, limit: int | None, seed: int) -> Sequence[Sample]:
    """The split's samples in order, read as they are asked for; with `limit`, that many drawn at random.

    (Not the first ones, which could be all of one task.)
    """
    count = len(StoredSamples(folder))
    if count == 0:
        raise UserError(f"the test split in {folder} has no rows: nothing to evaluate; check `prepare.sources`")
    drawn = range(count) if limit is None else random.Random(seed).sample(range(count), min(limit, count))
    return StoredSamples(folder, sorted(drawn))


def rows_set_apart(validated: Path) -> Counter[str]:
    """How many rows of the test split `validate` has in quarantine, by benchmark (`Sample.source`)."""
    files = sorted((validated / "quarantine").glob("*.parquet"))
    tables = [pq.read_table(file, columns=["split", "source"]) for file in files]
    return Counter(row["source"] or "" for table in tables for row in table.to_pylist() if row["split"] == "test")


def pictures_of(asked: Sequence[Sequence[Sample]], answers: Sequence[Prediction]) -> report.Pictures:
    """A sample's pictures by its id, read as they are asked for: its images, and the first frame of each video.

    `answers`: to all the samples of `asked`, in order.
    """
    every = ((samples, place) for samples in asked for place in range(len(samples)))
    places = {answer.id: place for answer, place in zip(answers, every, strict=True)}

    def read(name: str) -> tuple[bytes, ...]:
        samples, place = places[name]
        sample = samples[place]
        return (*sample.images, *(video.frames[0] for video in sample.videos))

    return read


def load_models(arms: Sequence[Arm], inputs: Mapping[str, Path], config: Config) -> dict[str, VisMemModel]:
    """The models that the arms decode, by `Arm.model`; each holds a base of its own in memory.

    A baseline's folder lays an adapter over the base, or (full fine-tuning) is a base itself.
    """
    device, base = "cuda" if torch.cuda.is_available() else "cpu", config.base
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
            model = load_variant(folder, inputs["base"], base.dtype, base.tensor_parallel)
        else:
            backbone = load_base(folder, base.dtype, base.tensor_parallel)
            model = VisMemModel(backbone, config.memory, config.invocation)
        model.backbone.model.to(device)
        models[arm.model] = model.to(device)
    return models


def measure(
    config: Config,
    inputs: Mapping[str, Path],
    predictions: Mapping[str, Sequence[Prediction]],
    seconds: Mapping[str, float],
    test_sha256: str,
    set_apart: Mapping[str, int] = MappingProxyType({}),
) -> Metrics:
    """The content of `metrics.json`. `seconds`: of each arm, for all answers; `set_apart`: see `summarise`."""
    ids = [answer.id for answer in predictions[VANILLA]]
    each = {arm: total / len(ids) for arm, total in seconds.items()}
    resamples = config.evaluate.bootstrap
    return Metrics(
        **summarise(predictions, each, seed=config.seed, resamples=resamples, set_apart=set_apart),
        stage2_sha256=sha256_folder(inputs["stage2"]),
        test_sha256=test_sha256,
        items_sha256=hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    )


def write(
    config: Config,
    out: Path,
    predictions: Mapping[str, Sequence[Prediction]],
    metrics: Metrics,
    charts: Mapping[str, Sequence[Panel]],
    pictures: report.Pictures,
    sources: Mapping[str, str],
    looks: Mapping[int, Sequence[Look]] = MappingProxyType({}),
    suite: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write all files of the step into `out`; leftovers of a killed run go. `suite`: its rows, where it was one.

    The answers that were kept go last: where a file cannot be written, the next run need not decode them again.
    """
    empty_folder(out, kept := [*out.glob(ANSWERS.format("*"))])
    for arm, answers in predictions.items():
        write_predictions(answers, predictions_file(out, arm))
    metrics.write(out)
    write_json(out / "scores.json", headline_figures(metrics))
    plots.write_plots(charts, metrics, predictions, out / "plots")
    git, apart = git_state(), sum(benchmark.set_apart for benchmark in metrics.benchmarks.values())
    provenance = {
        **sources,
        "test questions": f"{metrics.n}, and {apart} that validate set apart" if apart else str(metrics.n),
        "seed": str(metrics.seed),
        "git commit": f"{git['commit'] or 'unknown'}{', with uncommitted changes' if git['dirty'] else ''}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    page = report.render(metrics, predictions, charts, pictures, provenance, config.evaluate, looks, suite)
    write_text(out / "report.html", page)
    for file in kept:
        file.unlink()
