"""`vismem drift`: do the requests that a server logged still look like the data of its model?

Every comparison is the two-sample Kolmogorov-Smirnov test, its p-values by Holm's correction. With many requests every
difference is significant: only one that is also larger than `drift.max_distance` counts. With few none would be: then
the report says that it cannot tell.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp, kstwo

from vismem.config import DriftConfig, DvcPath, Severity
from vismem.data.dvc_source import COMMIT, find
from vismem.data.profile import Counts, Trained, counts, words_of
from vismem.errors import UserError
from vismem.evaluation.statistics import holm
from vismem.files import write_json
from vismem.pages import page_environment
from vismem.records import SIGNIFICANT, p_value
from vismem.validation.expectations import BETWEEN, NULL, Rule, Verdict, with_severities
from vismem.validation.project import Project
from vismem.validation.requests import read_requests

# What is compared: rule, what it is about, and the unit of its values.
FACTS = {
    "question_length": ("length of the questions", "characters"),
    "unseen_words": ("share of the questions with a word that no other question of training has", ""),
    "image_min_side": ("shorter side of the images", "pixels"),
    "image_max_side": ("longer side of the images", "pixels"),
    "brightness": ("brightness of the images", "of 255"),
    "repeats": ("share of the requests that were made before", ""),
    "answer_length": ("length of the answers, beside evaluation's", "tokens"),
    "memories": ("memories invoked per answer, beside evaluation's", ""),
}


def drift(settings: DriftConfig, trained: Trained, log: Path, days: float, out: Path) -> tuple[str, bool]:
    """Compare the requests of the last `days` with a version's data; a line, and whether an error was found.

    Writes `drift.json`, `report.html` and `gx/` into `out`, as `validate` does. UserError where there is no log.
    """
    every = with_severities(_rules(settings), settings.severities, "drift.severities")
    rows, unreadable = read_requests(log, days)
    found = compare(settings, trained, rows)
    few = [name for name, row in found.iterrows() if np.isnan(row["drift"])]
    values: dict[str, Any] = {f"{name}_drift": row["drift"] for name, row in found.iterrows()}
    moved, unknown = _data_now(trained)
    values |= {
        "few": ", ".join(map(str, few)) or None,
        "unreadable_share": unreadable / max(unreadable + len(rows), 1),
        "newer_data": "; ".join(filter(None, (trained.newer_data, *moved))) or None,
        "unknown_data": "; ".join(unknown) or None,
    }
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "gx", ignore_errors=True)
    project = Project(out)
    verdicts = [_said(v, values, found) for v in project.judge({"requests": pd.DataFrame([values])}, every)]
    project.finish()
    errors = [v.rule.name for v in verdicts if not v.success and v.rule.severity is Severity.ERROR]
    head = f"{len(rows):,} requests of the last {days:g} days, beside the data of version {trained.version}"
    line = f"{head}: {_listed(verdicts)}"
    record = {"version": trained.version, "requests": len(rows), "unreadable": unreadable, "days": days}
    write_json(out / "drift.json", record | {"rules": [v.record().model_dump(mode="json") for v in verdicts]})
    facts = [{"name": name, **row} for name, row in found.to_dict("index").items()]
    page = page_environment("vismem.validation").get_template("drift.html.j2")
    text = page.render(head=head, verdicts=verdicts, errors=errors, facts=facts, about=FACTS, p_value=p_value)
    (out / "report.html").write_text(text, encoding="utf-8")
    return line, bool(errors)


def compare(settings: DriftConfig, trained: Trained, rows: pd.DataFrame) -> pd.DataFrame:
    """A row per fact of FACTS: n, reference_n, distance, p (Holm's), mean, reference_mean, drift.

    `drift` is the distance, missing where the requests are too few to tell whether it is over the limit. Requests that
    were made before count once, but for `repeats`; images by what is seen; answers only of this version, as it learned.
    """
    pairs = {name: (reference, seen) for name, reference, seen in _distributions(trained, rows)}
    measured = {name: _distance(*pair, more=name == "repeats") for name, pair in pairs.items()}
    table = pd.DataFrame.from_dict(measured, orient="index", columns=["n", "reference_n", "distance", "p"])
    table["p"] = holm(table["p"].tolist())
    table["mean"], table["reference_mean"] = ([_mean(pair[of]) for pair in pairs.values()] for of in (1, 0))
    limit, level = settings.max_distance, SIGNIFICANT / len(table)
    size = table["n"] * table["reference_n"] / (table["n"] + table["reference_n"]).clip(lower=1)  # as of one sample
    detectable = np.where(size < 1, 1.0, kstwo.isf(level, size.clip(lower=1).round()))
    shown = (table["distance"] > limit) & (table["p"] < SIGNIFICANT)
    told = shown | ((table["distance"] <= limit) & (detectable <= limit))
    return table.assign(drift=table["distance"].where(told))


def _distributions(trained: Trained, rows: pd.DataFrame) -> Iterator[tuple[str, Counts, Counts]]:
    profile, once = trained.profile, rows.drop_duplicates("request")
    images = once.drop_duplicates("image_hashes")
    known = set(profile.words)
    answered = once[(once["manifest_sha256"] == trained.manifest_sha256) & (once["memory"] == "learned")]
    yield "question_length", profile.question_length, counts(once["question_chars"])
    yield "unseen_words", profile.unseen_words, counts(bool(words_of(text) - known) for text in once["question"])
    yield "image_min_side", profile.image_min_side, counts(images["min_side"])
    yield "image_max_side", profile.image_max_side, counts(images["max_side"])
    yield "brightness", profile.brightness, counts(images["brightness"])
    yield "repeats", profile.repeats, counts(rows["request"].value_counts())
    yield "answer_length", trained.answer_length, counts(answered["tokens"])
    yield "memories", trained.memories, counts(answered["memories"])


def _data_now(trained: Trained) -> tuple[list[str], list[str]]:
    """What DVC keeps under the revisions of a version's data: where it is other data now, and where nobody can tell."""
    moved, unknown = [], dict[str, str]()  # by repository, each asked no more once it did not answer
    for kept in trained.revisions:
        if COMMIT.fullmatch(kept.rev) or kept.repo in unknown:
            continue
        try:
            now = find(DvcPath(repo=kept.repo, rev=kept.rev or "HEAD", path=Path(kept.path)))
        except UserError as error:
            unknown[kept.repo] = str(error).removeprefix("prepare.sources dvc: ")
        else:
            if now.md5 != kept.md5:
                of = f"{kept.path} of {kept.repo} is {now.md5} since commit {now.commit[:12]}"
                moved.append(f"{of}, and version {trained.version} was trained on {kept.md5}")
    return moved, [*unknown.values()]


def _distance(reference: Counts, seen: Counts, more: bool) -> tuple[int, int, float, float]:
    """Sizes, distance and p of two samples; `more`: only larger values than the reference's count."""
    values = [np.repeat(list(held), list(held.values())) for held in (reference, seen)]
    if not (len(values[0]) and len(values[1])):
        return len(values[1]), len(values[0]), 0.0, 1.0
    found = ks_2samp(*values, alternative="greater" if more else "two-sided", method="asymp")
    return len(values[1]), len(values[0]), float(found.statistic), float(found.pvalue)


def _mean(held: Counts) -> float:
    return sum(value * count for value, count in held.items()) / max(sum(held.values()), 1)


def _rules(settings: DriftConfig) -> Iterator[Rule]:
    """The rules, about one row of figures."""
    limit, error, warning = settings.max_distance, Severity.ERROR, Severity.WARNING
    for name, (about, _) in FACTS.items():
        holds = f"{about}: at most {limit:.0%} away from training"
        yield Rule(name, error, "requests", f"{name}_drift", BETWEEN, {"max_value": limit}, holds, about)
    yield Rule("champion_current", error, "requests", "newer_data", NULL, {},
               "no newer version was trained on other data, and its own has not changed", "{newer_data}")  # fmt: skip
    yield Rule("data_known", warning, "requests", "unknown_data", NULL, {},
               "what its data is now can be found out", "{unknown_data}")  # fmt: skip
    yield Rule("enough_requests", warning, "requests", "few", NULL, {},
               f"there are enough requests to see a distance of {limit:.0%}", "too few to tell: {few}")  # fmt: skip
    yield Rule("lines_readable", warning, "requests", "unreadable_share", BETWEEN,
               {"max_value": settings.max_unreadable}, "the lines of the log can be read",
               "{unreadable_share:.1%} of the lines are damaged")  # fmt: skip


def _said(verdict: Verdict, values: dict[str, Any], found: pd.DataFrame) -> Verdict:
    """The verdict with what is said of its rule."""
    rule = verdict.rule
    if verdict.success or rule.name not in FACTS:
        return replace(verdict, message=rule.holds if verdict.success else rule.broken.format(**values))
    row, (about, unit) = found.loc[rule.name], FACTS[rule.name]
    means = f"mean {row['mean']:.2f}{unit and f' {unit}'}, and {row['reference_mean']:.2f} before"
    figures = f"distance {row['distance']:.1%}, {p_value(row['p'])}, {row['n']:,.0f} beside {row['reference_n']:,.0f}"
    return replace(verdict, message=f"{about}: {means} ({figures})")


def _listed(verdicts: Sequence[Verdict]) -> str:
    """The broken rules, one a line."""
    broken = [v for v in verdicts if not v.success]
    said = "".join(f"\n  - {v.rule.severity.value} {v.rule.name}: {v.message}" for v in broken)
    return said or "no drift"
