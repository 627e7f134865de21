"""What a step made, read from its folder: where it came from, its figures, its reports. Plain values throughout."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vismem.provenance import MANIFEST, sha256_file, sha256_folder
from vismem.records import Metrics, ParityReport, RegisteredVersion, Release, Validation, Verdict

Value = str | int | float | bool


@dataclass(frozen=True)
class Result:
    """`metadata` says what the output is and where it came from, `metrics` how good it is; `report` is an HTML page."""

    line: str
    metadata: dict[str, Value] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    report: Path | None = None


def describe(name: str, folder: Path, line: str = "") -> Result:
    """What the step `name` left in `folder`. Figures that are no finite numbers are left out."""
    metadata, metrics = _READERS[name](folder)
    report = folder / "report.html"
    finite = {key: float(value) for key, value in metrics.items() if value is not None and math.isfinite(value)}
    return Result(line, metadata, finite, report if report.is_file() else None)


def yes_no_confusion(evaluate: Path | str, page: str, arm: str = "vismem") -> tuple[list[str], list[list[int]]] | None:
    """(categories, counts) of an arm's answers to yes/no questions: a row what was right, a column what was said.

    Also written to the file `page`, as JSON. None where the test split has no such question, or no such arm answered.
    """
    import pyarrow.parquet as pq

    from vismem.evaluation.answers import normalise

    file = Path(evaluate) / "predictions" / f"{arm}.parquet"
    rows = pq.read_table(file, columns=["reference", "extracted"]).to_pylist() if file.is_file() else []
    categories = ["yes", "no", "other"]
    counts = [[0] * len(categories) for _ in categories]
    for row in rows:
        right, said = normalise(row["reference"]), normalise(row["extracted"] or "")
        if right in ("yes", "no"):
            counts[categories.index(right)][categories.index(said if said in ("yes", "no") else "other")] += 1
    write_json(page, {"categories": categories, "counts": counts})
    return (categories, counts) if any(map(any, counts)) else None


def write_page(file: Path | str, text: str) -> None:
    """Write an artifact where Kubeflow looks for its file."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


def write_json(file: Path | str, values: Mapping[str, Any]) -> None:
    """Write an artifact's values."""
    write_page(file, json.dumps(values, indent=2) + "\n")


def verdict_page(register: Path | str) -> str:
    """The gate's verdict as Markdown, one line a rule."""
    folder = Path(register)
    version, verdict = RegisteredVersion.read(folder), Verdict.read(folder)
    word = "passes" if verdict.passed else "refuses"
    rows = [f"| {'✓' if rule.passed else '✗'} | {rule.name} | {rule.reason} |" for rule in verdict.rules]
    head = f"# The gate {word} {version.name} version {version.version}"
    return "\n".join([head, "", "| | rule | reason |", "|---|---|---|", *rows, ""])


# --- one reader a step: (metadata, metrics) ---------------------------------------------------------------------------


def _prepare(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    stats = _read(folder / "stats.json")
    rows = {f"rows_{split}": values["rows"] for split, values in stats["splits"].items()}
    return {"data_sha256": stats["data_sha256"], "seed": stats["seed"], **rows}, rows


def _validate(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    validation = Validation.read(folder)
    rows = {f"rows_{name}": count for name, count in validation.rows.model_dump(exclude={"splits"}).items()}
    shards = sha256_folder(folder / "data", "**/*.parquet")  # as a bundle's lineage names its data
    return {"data_sha256": validation.data_sha256, "shards_sha256": shards, **rows}, rows


def _base(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    model_type = _read(folder / "config.json")["model_type"]
    figures = _read(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}  # only where trained here
    return {"model_sha256": sha256_folder(folder), "model_type": model_type}, _numbers(figures)


def _stage(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    metrics = _read(folder / "metrics.json")
    scores = {f"validation_{arm}": values["score"] for arm, values in metrics["validation"].items()}
    return {"model_sha256": sha256_folder(folder)}, {**scores, **_numbers(metrics)}


def _evaluate(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    metrics = Metrics.read(folder)
    scores = {f"{arm}_{name}": value for arm, values in metrics.arms.items() for name, value in values.items()}
    if gain := metrics.gain.get("overall"):
        scores |= {"gain": gain.delta, "gain_low": gain.ci95[0], "gain_high": gain.ci95[1], "gain_p": gain.p}
    return {"stage2_sha256": metrics.stage2_sha256, "questions": metrics.n}, scores


def _export(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    lineage, parity = _read(folder / "lineage.json"), ParityReport.read(folder)
    metadata: dict[str, Value] = {
        "manifest_sha256": sha256_file(folder / MANIFEST),
        "data_sha256": lineage["data_sha256"],
        "git_commit": lineage["git"]["commit"] or "unknown",
        "parity": parity.passed,
    }
    return metadata, {"parity_items": parity.items, "parity_equal": parity.greedy_equal}


def _register(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    version = RegisteredVersion.read(folder).model_dump(exclude={"judged_against"})
    return {**version, "verdict": "passed" if Verdict.read(folder).passed else "refused"}, {}


def _promote(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    release = Release.read(folder)
    return {**release.model_dump(exclude={"previous"}), "reasons": "; ".join(release.reasons)}, {}


def _deploy(folder: Path) -> tuple[dict[str, Value], dict[str, Any]]:
    smoke = _read(folder / "smoke.json")
    repository = sha256_folder(folder / "model_repository")
    return {"model": smoke["model"], "version": smoke["version"], "repository_sha256": repository}, smoke["latency_ms"]


_READERS = {
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


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text())
    return values
