"""What the view of a run shows: of a step's output folder metadata, figures and a page; of the run its outcome."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vismem.data.revisions import read_revisions, revision_tags, revisions_of
from vismem.files import read_json, write_json, write_text
from vismem.provenance import MANIFEST, sha256_file, sha256_folder
from vismem.records import OVERALL, Metrics, ParityReport, RegisteredVersion, Release, Validation, Verdict, portable

Values = dict[str, Any]
REPORTS = {"validate": "report.html", "evaluate": "report.html", "export": "README.md"}
OUTCOMES = {  # the driver says COMPLETE (ML Metadata's word), the API server and the local runner SUCCEEDED
    **dict.fromkeys(("COMPLETE", "SUCCEEDED", "CACHED"), "succeeded"),
    **dict.fromkeys(("CANCELED", "CANCELLED", "CANCELING"), "was canceled"),
    "FAILED": "failed",
    "RUNNING": "did not complete",  # what the driver says of a run that lost a pod, so that nothing was reported of it
}
REMEDY = (
    "The failed task is red in the run's graph; its log ends with the reason. A task without a log was killed or never "
    "started (out of memory, evicted, no image, no node): `kubectl -n NAMESPACE get events` shows that. Submitted "
    "again, the run keeps what was made."
)


def describe(name: str, folder: Path) -> tuple[Values, dict[str, float]]:
    """(metadata, metrics) of what the step `name` left in `folder`: what it is and where it came from, how good it is.

    Plain values. Figures that are not finite are left out.
    """
    metadata, metrics = _read(name, folder)
    return metadata, {key: float(value) for key, value in metrics.items() if value is not None and math.isfinite(value)}


def _read(name: str, folder: Path) -> tuple[Values, Values]:
    match name:
        case "prepare":
            stats = read_json(folder / "stats.json")
            rows = {f"rows_{split}": values["rows"] for split, values in stats["splits"].items()}
            kept = revision_tags(read_revisions(folder))
            return {"data_sha256": stats["data_sha256"], "seed": stats["seed"], **rows, **kept}, rows
        case "validate":
            validation = Validation.read(folder)
            rows = {f"rows_{key}": count for key, count in validation.rows.model_dump(exclude={"splits"}).items()}
            shards = sha256_folder(folder / "data", "**/*.parquet")  # as a bundle's lineage names its data
            kept = revision_tags(read_revisions(folder))
            return {"data_sha256": validation.data_sha256, "shards_sha256": shards, **rows, **kept}, rows
        case "base":
            figures = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
            model_type = read_json(folder / "config.json")["model_type"]
            return {"model_sha256": sha256_folder(folder), "model_type": model_type}, _numbers(figures)
        case "stage1" | "stage2":
            figures = read_json(folder / "metrics.json")
            scores = {f"validation_{arm}": values["score"] for arm, values in figures["validation"].items()}
            return {"model_sha256": sha256_folder(folder)}, {**scores, **_numbers(figures)}
        case "evaluate":
            metrics = Metrics.read(folder)
            scores = {
                f"{portable(arm)}_{group}": score
                for arm, groups in metrics.arms.items()
                for group, score in groups.items()
            }
            if gain := metrics.gain.get(OVERALL):
                scores |= {"gain": gain.delta, "gain_low": gain.ci95[0], "gain_high": gain.ci95[1], "gain_p": gain.p}
            return {"stage2_sha256": metrics.stage2_sha256, "questions": metrics.n}, scores
        case "export":
            lineage, parity = read_json(folder / "lineage.json"), ParityReport.read(folder)
            commit = lineage["git"]["commit"] or "unknown"
            made = {"manifest_sha256": sha256_file(folder / MANIFEST), "data_sha256": lineage["data_sha256"]}
            made |= revision_tags(revisions_of(lineage))
            equal = {"parity_items": parity.items, "parity_equal": parity.greedy_equal}
            return {**made, "git_commit": commit, "parity": parity.passed}, equal
        case "register":
            version = RegisteredVersion.read(folder).model_dump(exclude={"judged_against"})
            return {**version, "verdict": "passed" if Verdict.read(folder).passed else "refused"}, {}
        case "promote":
            release = Release.read(folder)
            return {**release.model_dump(exclude={"previous"}), "reasons": "; ".join(release.reasons)}, {}
        case "deploy":
            smoke = read_json(folder / "smoke.json")
            return {name: smoke[name] for name in ("model", "version", "manifest_sha256")}, smoke["latency_ms"]
    raise KeyError(name)


def _numbers(values: Mapping[str, Any]) -> Values:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


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


def write_confusion(evaluate: str, page: str) -> tuple[list[str], list[list[int]]] | None:
    """(categories, counts) of VisMem's answers to yes/no questions: one row per reference, one column per answer.

    Also written to the file `page`, as JSON. None where the test split has no such question, or VisMem did not answer.
    """
    import pyarrow.parquet as pq

    from vismem.data.answer_forms import normalise

    file = Path(evaluate) / "predictions" / "vismem.parquet"
    rows = pq.read_table(file, columns=["reference", "extracted"]).to_pylist() if file.is_file() else []
    categories = ["yes", "no", "other"]
    counts = [[0] * len(categories) for _ in categories]
    for row in rows:
        reference, answer = normalise(row["reference"]), normalise(row["extracted"] or "")
        if reference in ("yes", "no"):
            counts[categories.index(reference)][categories.index(answer if answer in ("yes", "no") else "other")] += 1
    write_json(Path(page), {"categories": categories, "counts": counts})
    return (categories, counts) if any(map(any, counts)) else None


def write_summary(page: str, state: str, message: str = "") -> str:
    """Write how the run ended to the file `page`, as Markdown, and return it.

    `state` and `message` are those of dsl.PipelineTaskFinalStatus. Kubeflow's driver leaves `message` empty.
    """
    outcome = OUTCOMES.get(state.upper(), f"ended in state {state or 'unknown'}")
    details = [message or "Kubeflow hands over no error message.", "", REMEDY]
    if outcome == "succeeded":
        details = ["Every task succeeded, was kept from an earlier run, or was not needed."]
    text = "\n".join([f"# The run {outcome}", "", *details, ""])
    write_text(Path(page), text)
    return text
