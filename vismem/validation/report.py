"""`report.html` of the step `validate`: one self-contained page that reads offline."""

from collections import Counter
from typing import Any

import pandas as pd

from vismem.config import ValidateConfig
from vismem.data.fingerprint import SPLITS
from vismem.pages import page_environment, thumbnail
from vismem.validation.facts import read_rows
from vismem.validation.findings import Findings

SAMPLES_A_TASK = 2
TASKS_SHOWN = 24
QUARANTINED_SHOWN = 50
ANSWERS_SHOWN = 8


def render(findings: Findings, settings: ValidateConfig) -> str:
    """The page as text. Images in it are thumbnails of a few samples a task and of the first quarantined rows."""
    clean = findings.clean
    shown = list(findings.reasons)[:QUARANTINED_SHOWN]
    bad = _load(findings, findings.rows.loc[shown])
    splits = [_split(split, findings) for split in reversed(SPLITS)]
    page: str = (
        page_environment("vismem.validation")
        .get_template("report.html.j2")
        .render(
            errors=findings.errors,
            warnings=findings.warnings,
            verdicts=findings.verdicts,
            total=len(findings.rows),
            clean=len(clean),
            quarantined=len(findings.reasons),
            images=len({digest for hashes in clean["image_hashes"] for digest in hashes}),
            answers=clean["answer"].nunique(),
            data_sha256=findings.data_sha256,
            splits=splits,
            top_share=max((answer["share"] for split in splits for answer in split["answers"]), default=1.0),
            tasks=_tasks(findings),
            samples=_samples(findings),
            bad=[bad[index] | {"reason": findings.reasons[index]} for index in shown],
            settings=settings,
        )
    )
    return page


def _split(split: str, findings: Findings) -> dict[str, Any]:
    ours = findings.clean[findings.clean["split"] == split]
    facts = findings.splits.set_index("split").loc[split]
    counts = Counter(ours["answer"])
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:ANSWERS_SHOWN]
    sides = (ours["min_side"].min(), ours["max_side"].max()) if ours["min_side"].notna().any() else ()
    return {
        "name": split,
        "rows": int((findings.rows["split"] == split).sum()),
        "clean": len(ours),
        "images": len({digest for hashes in ours["image_hashes"] for digest in hashes}),
        "sides": " to ".join(dict.fromkeys(f"{side:.0f}" for side in sides)),
        "question_chars": f"{ours['question_chars'].median():.0f}" if len(ours) else "",
        "answers": [{"text": text, "count": count, "share": count / len(ours)} for text, count in top],
        "distinct_answers": len(counts),
        "drift": None if pd.isna(facts["task_drift"]) else float(facts["task_drift"]),
    }


def _tasks(findings: Findings) -> list[dict[str, Any]]:
    """The task mix as a table: one row per task, with its share of each split and of the profile."""
    mixes = [findings.task_mix[split] for split in reversed(SPLITS)]
    names = sorted(set(findings.profile).union(*mixes))
    shares = {name: [mix.get(name, 0.0) for mix in (*mixes, findings.profile)] for name in names}
    return [{"name": name, "shares": each[:-1], "profile": each[-1]} for name, each in shares.items()]


def _samples(findings: Findings) -> list[dict[str, Any]]:
    """A few good rows per task, from the train split where it has the task."""
    ordered = findings.clean.assign(rank=findings.clean["split"].map(("train", "validation", "test").index))
    ordered = ordered.sort_values(["rank", "shard", "position"], kind="stable")
    chosen = ordered.groupby("task", sort=True).head(SAMPLES_A_TASK)
    names = sorted(chosen["task"].unique())[:TASKS_SHOWN]
    loaded = _load(findings, chosen)
    return [{"task": name, "rows": [loaded[index] for index in chosen.index[chosen["task"] == name]]} for name in names]


def _load(findings: Findings, chosen: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """Read some rows of the shards again, with thumbnails in the place of images; keys are the index of `chosen`."""
    loaded: dict[int, dict[str, Any]] = {}
    for number, ours in chosen.groupby("shard"):
        shard = findings.shards[int(number)]
        rows = read_rows(shard.path, ours["position"])
        for index, position in ours["position"].items():
            thumbnails = [thumbnail(data or b"") for data in (rows[position]["images"] or ())[:4]]
            place = {"split": shard.split, "place": f"{shard.name} row {position}"}
            loaded[int(index)] = rows[position] | {"thumbnails": thumbnails} | place
    return loaded
