"""What a step's output folder says of itself: metadata, figures, and the page for the run's view. Plain values."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vismem.files import read_json, write_json
from vismem.provenance import MANIFEST, sha256_file, sha256_folder
from vismem.records import Metrics, ParityReport, RegisteredVersion, Release, Validation, Verdict

Values = dict[str, Any]
Description = tuple[Values, Values]  # metadata: what it is and where it came from; metrics: how good it is
REPORTS = {"validate": "report.html", "evaluate": "report.html", "export": "README.md"}


def describe(name: str, folder: Path) -> tuple[Values, dict[str, float]]:
    """(metadata, metrics) of what the step `name` left in `folder`. Figures that are not finite are left out."""
    metadata, metrics = _READERS[name](folder)
    return metadata, {key: float(value) for key, value in metrics.items() if value is not None and math.isfinite(value)}


def render_report(name: str, folder: Path) -> str:
    """The page of a step's output: its own report, or for `register` and `promote` Markdown from their verdict."""
    if name in REPORTS:
        return (folder / REPORTS[name]).read_text()
    if name == "register":
        version, verdict = RegisteredVersion.read(folder), Verdict.read(folder)
        word = "passes" if verdict.passed else "refuses"
        rules = [f"| {'✓' if rule.passed else '✗'} | {rule.name} | {rule.reason} |" for rule in verdict.rules]
        head = f"# The gate {word} {version.name} version {version.version}"
        return "\n".join([head, "", "| | rule | reason |", "|---|---|---|", *rules, ""])
    release = Release.read(folder)
    head = f"# {'Promoted' if release.promoted else 'Not promoted'}: {release.name} version {release.version}"
    reasons = [f"- {reason}" for reason in release.reasons]
    last = [] if release.promoted else ["", "Nothing is deployed; the served model stays as it is."]
    return "\n".join([head, "", *reasons, *last, ""])


def write_confusion(evaluate: str, page: str, arm: str = "vismem") -> tuple[list[str], list[list[int]]] | None:
    """(categories, counts) of an arm's answers to yes/no questions: one row per reference, one column per answer.

    Also written to the file `page`, as JSON. None where the test split has no such question, or no such arm answered.
    """
    import pyarrow.parquet as pq

    from vismem.evaluation.answers import normalise

    file = Path(evaluate) / "predictions" / f"{arm}.parquet"
    rows = pq.read_table(file, columns=["reference", "extracted"]).to_pylist() if file.is_file() else []
    categories = ["yes", "no", "other"]
    counts = [[0] * len(categories) for _ in categories]
    for row in rows:
        reference, answer = normalise(row["reference"]), normalise(row["extracted"] or "")
        if reference in ("yes", "no"):
            counts[categories.index(reference)][categories.index(answer if answer in ("yes", "no") else "other")] += 1
    write_json(Path(page), {"categories": categories, "counts": counts})
    return (categories, counts) if any(map(any, counts)) else None


# --- one reader per step ----------------------------------------------------------------------------------------------


def _prepare(folder: Path) -> Description:
    stats = read_json(folder / "stats.json")
    rows = {f"rows_{split}": values["rows"] for split, values in stats["splits"].items()}
    return {"data_sha256": stats["data_sha256"], "seed": stats["seed"], **rows}, rows


def _validate(folder: Path) -> Description:
    validation = Validation.read(folder)
    rows = {f"rows_{name}": count for name, count in validation.rows.model_dump(exclude={"splits"}).items()}
    shards = sha256_folder(folder / "data", "**/*.parquet")  # as a bundle's lineage names its data
    return {"data_sha256": validation.data_sha256, "shards_sha256": shards, **rows}, rows


def _base(folder: Path) -> Description:
    figures = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    model_type = read_json(folder / "config.json")["model_type"]
    return {"model_sha256": sha256_folder(folder), "model_type": model_type}, _numbers(figures)


def _stage(folder: Path) -> Description:
    metrics = read_json(folder / "metrics.json")
    scores = {f"validation_{arm}": values["score"] for arm, values in metrics["validation"].items()}
    return {"model_sha256": sha256_folder(folder)}, {**scores, **_numbers(metrics)}


def _evaluate(folder: Path) -> Description:
    metrics = Metrics.read(folder)
    scores = {f"{arm}_{name}": value for arm, values in metrics.arms.items() for name, value in values.items()}
    if gain := metrics.gain.get("overall"):
        scores |= {"gain": gain.delta, "gain_low": gain.ci95[0], "gain_high": gain.ci95[1], "gain_p": gain.p}
    return {"stage2_sha256": metrics.stage2_sha256, "questions": metrics.n}, scores


def _export(folder: Path) -> Description:
    lineage, parity = read_json(folder / "lineage.json"), ParityReport.read(folder)
    metadata = {
        "manifest_sha256": sha256_file(folder / MANIFEST),
        "data_sha256": lineage["data_sha256"],
        "git_commit": lineage["git"]["commit"] or "unknown",
        "parity": parity.passed,
    }
    return metadata, {"parity_items": parity.items, "parity_equal": parity.greedy_equal}


def _register(folder: Path) -> Description:
    version = RegisteredVersion.read(folder).model_dump(exclude={"judged_against"})
    return {**version, "verdict": "passed" if Verdict.read(folder).passed else "refused"}, {}


def _promote(folder: Path) -> Description:
    release = Release.read(folder)
    return {**release.model_dump(exclude={"previous"}), "reasons": "; ".join(release.reasons)}, {}


def _deploy(folder: Path) -> Description:
    smoke = read_json(folder / "smoke.json")
    repository = sha256_folder(folder / "model_repository")
    return {"model": smoke["model"], "version": smoke["version"], "repository_sha256": repository}, smoke["latency_ms"]


_READERS: dict[str, Callable[[Path], Description]] = {
    "prepare": _prepare,
    "validate": _validate,
    "base": _base,
    "stage1": _stage,
    "stage2": _stage,
    "evaluate": _evaluate,
    "export": _export,
    "register": _register,
    "promote": _promote,
    "deploy": _deploy,
}


def _numbers(values: Mapping[str, Any]) -> Values:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
