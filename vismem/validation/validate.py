"""The step `validate`: judge the prepared shards, set bad rows apart with the reason, stop the pipeline on an error."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vismem.config import BaseConfig, Config, Severity, ValidateConfig
from vismem.data.fingerprint import SPLITS
from vismem.data.profile import profile_of
from vismem.data.revisions import read_revisions, write_revisions
from vismem.data.sample import SCHEMA, shard_tables, write_shards
from vismem.errors import UserError, first_line
from vismem.files import read_json, write_json
from vismem.models.small_files import read_tokenizer
from vismem.models.tokens import MEMORY_TOKENS
from vismem.progress import progress
from vismem.records import AllRowCounts, RowCounts, Validation
from vismem.runtime.reserved import Reserved
from vismem.validation.expectations import Verdict, rules
from vismem.validation.facts import KEPT, Shard, collect_facts, find_shards
from vismem.validation.findings import Findings
from vismem.validation.project import Project
from vismem.validation.report import render

QUARANTINE_SCHEMA = pa.schema([*SCHEMA, ("reason", pa.string()), ("split", pa.string())])
SHOWN = 20  # rows that are named of those that break a rule
Mix = Mapping[str, float]  # task -> share


def validate(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Judge the shards of `inputs["prepare"]` and sort their rows into `out/data/<split>` and `out/quarantine`.

    Also writes `validation.json`, `task_profile.json` (the train split's task mix), `profile.json` (see `Profile`),
    `report.html`, and the facts, suites, checkpoint and Data Docs as a project of Great Expectations, `gx/`.
    Raises UserError with the list of broken rules of severity error; `out` then holds the report and the verdicts, and
    no data.
    """
    for name in ("data", "quarantine", "gx"):
        shutil.rmtree(out / name, ignore_errors=True)  # of a killed or failed run
    settings = config.validate_
    findings = examine(settings, inputs["prepare"], _reserved(config.base), out)
    _record(findings).write(out)
    write_revisions(out, read_revisions(inputs["prepare"]))
    write_json(out / "task_profile.json", findings.task_mix["train"])
    profile_of(findings.clean[findings.clean["split"] == "train"]).write(out)
    (out / "report.html").write_text(render(findings, settings), encoding="utf-8")
    if findings.errors:
        listed = "".join(f"\n  - {line}" for line in findings.errors)
        raise UserError(f"the data breaks {len(findings.errors)} rule(s):{listed}\nThe report is {out / 'report.html'}")
    _write_clean(findings, out)
    tail = f"; warnings: {', '.join(findings.warnings)}" if findings.warnings else ""
    rows, clean, bad = map(len, (findings.rows, findings.clean, findings.reasons))
    return f"validated {rows} rows: {clean} clean, {bad} in quarantine{tail}"


def _reserved(base: BaseConfig) -> Reserved:
    """The base's own tokens, those that VisMem adds among them. UserError where its tokenizer cannot be read."""
    try:
        return Reserved(read_tokenizer(base), MEMORY_TOKENS)
    except OSError as error:
        raise UserError(
            f"base.model '{base.model}' has no tokenizer.json to check texts by ({first_line(error)}): give a base "
            "that has one, or reach the hub"
        ) from None


def examine(settings: ValidateConfig, folder: Path, reserved: Reserved, out: Path) -> Findings:
    """Judge the shards below `folder` by every rule, with a base that has these tokens; only `out/gx` is written."""
    every = rules(settings)
    project = Project(out, settings.plugins)
    if settings.expectations:
        every += project.own_rules(settings.expectations, KEPT, {rule.name for rule in every})
    stored = _read_profile(settings.task_profile) if settings.task_profile else None
    shards = find_shards(folder)
    good = [shard for shard in shards if shard.fault is None]
    with progress("validate rows", sum(shard.rows for shard in good)) as advance:
        rows = collect_facts(good, settings, reserved, advance)
    shard_table = pd.DataFrame({"shard": [s.name for s in shards], "fault": [s.fault for s in shards]}, dtype=object)
    tables = {"shards": shard_table, "rows": rows[[name for name in rows if name in KEPT]]}
    verdicts = project.judge(tables, every)
    reasons = _reasons(verdicts, rows)
    clean = rows.drop(index=list(reasons))
    task_mix = {split: _shares(clean.loc[clean["split"] == split, "task"]) for split in SPLITS}
    profile = task_mix["train"] if stored is None else stored
    splits = _split_table(rows, clean, settings.required_splits, task_mix, profile)
    share = len(reasons) / len(rows) if len(rows) else 0.0
    total = pd.DataFrame([{"rows": len(rows), "quarantined": len(reasons), "quarantined_share": share}])
    verdicts += project.judge({"splits": splits, "total": total}, every)
    project.finish()
    tables |= {"splits": splits, "total": total}
    said = [_said(verdict, tables[verdict.rule.table], good) for verdict in verdicts]
    said.sort(key=lambda verdict: every.index(verdict.rule))
    return Findings(good, rows, splits, reasons, said, task_mix, profile)


def _reasons(verdicts: Sequence[Verdict], rows: pd.DataFrame) -> dict[int, str]:
    """Why each bad row is bad: the quarantining rules that it breaks."""
    found: dict[int, list[str]] = {}
    for verdict in verdicts:
        if verdict.rule.severity is Severity.QUARANTINE:
            facts = rows.loc[list(verdict.rows)].to_dict("records")
            for index, row in zip(verdict.rows, facts, strict=True):
                found.setdefault(index, []).append(f"{verdict.rule.name}: {verdict.rule.broken.format(**row)}")
    return {index: "; ".join(found[index]) for index in sorted(found)}


def _said(verdict: Verdict, table: pd.DataFrame, shards: Sequence[Shard]) -> Verdict:
    """The verdict with what is said of its rule: that it holds, or how many rows break it and the first of them."""
    rule, rows = verdict.rule, table.loc[list(verdict.rows)]
    if verdict.success:
        return replace(verdict, message=rule.holds)
    shown = rows.head(SHOWN) if rule.table == "rows" else rows
    broken = [rule.broken.format(**row) for row in shown.to_dict("records")]
    if rule.table != "rows":
        return replace(verdict, message="; ".join(broken))
    if rows.empty:  # it is about the column as a whole
        return replace(verdict, message=f"does not hold ({rule.holds}); observed: {verdict.value}")
    where = [f"{shards[row.shard].name} row {row.position} (id '{row.id}')" for row in shown.itertuples()]
    places = tuple(f"{place}: {phrase}" for place, phrase in zip(where, broken, strict=True))
    counts = ", ".join(f"{count} of {split}" for split, count in rows["split"].value_counts(sort=False).items())
    return replace(verdict, message=f"{counts}; first {places[0]}", places=places)


def _split_table(
    rows: pd.DataFrame, clean: pd.DataFrame, required: Sequence[str], task_mix: Mapping[str, Mix], profile: Mix
) -> pd.DataFrame:
    table: list[tuple[Any, ...]] = []
    for split in SPLITS:
        answers = Counter(clean.loc[clean["split"] == split, "answer"])
        kept, there = answers.total(), int((rows["split"] == split).sum())
        label, count = min(answers.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
        drift = total_variation(task_mix[split], profile) if kept and profile else None
        lost = 1 - kept / there if there else None
        needed = kept if split in required else None
        table.append((split, kept, label, needed, count / kept if kept else None, drift, lost))
    figures = ["required_rows", "label_share", "task_drift", "lost_share"]
    return pd.DataFrame(table, columns=["split", "rows", "label", *figures]).astype(dict.fromkeys(figures, "float64"))


def total_variation(one: Mix, other: Mix) -> float:
    """Half the summed absolute difference of two mixes: 0 for the same, 1 for mixes without a common task."""
    return sum(abs(one.get(task, 0.0) - other.get(task, 0.0)) for task in sorted({*one, *other})) / 2


def _shares(tasks: pd.Series) -> dict[str, float]:
    return dict(tasks.value_counts(normalize=True).sort_index())


def _read_profile(path: Path) -> dict[str, float]:
    profile = read_json(path, "check validate.task_profile (an earlier task_profile.json), or set it to null")
    if not isinstance(profile, dict) or not all(isinstance(share, int | float) for share in profile.values()):
        raise UserError(f'the task profile {path} must map task names to shares, such as {{"counting": 0.25}}')
    return profile


def _record(findings: Findings) -> Validation:
    total, clean = (Counter(facts["split"]) for facts in (findings.rows, findings.clean))
    return Validation(
        success=not findings.errors,
        rows=AllRowCounts(
            total=len(findings.rows),
            clean=len(findings.clean),
            quarantined=len(findings.reasons),
            splits={s: RowCounts(total=total[s], clean=clean[s], quarantined=total[s] - clean[s]) for s in SPLITS},
        ),
        data_sha256=findings.data_sha256,
        rules=tuple(verdict.record() for verdict in findings.verdicts),
        task_mix=findings.task_mix,
    )


def _write_clean(findings: Findings, out: Path) -> None:
    """Write the good rows as shards with the names they had, and the bad ones, with their reasons, apart."""
    (out / "quarantine").mkdir(parents=True, exist_ok=True)
    bad = findings.rows.loc[list(findings.reasons)]
    with pq.ParquetWriter(out / "quarantine" / "part-00000.parquet", QUARANTINE_SCHEMA, compression="zstd") as apart:
        for number, shard in enumerate(findings.shards):
            positions = bad.loc[bad["shard"] == number, "position"]
            reasons = {int(position): findings.reasons[index] for index, position in positions.items()}
            target = out / "data" / shard.split / shard.path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if reasons:
                _sort_out(shard, reasons, target, apart)
            else:
                shutil.copyfile(shard.path, target)
    for split in SPLITS:
        if not (out / "data" / split).exists():
            write_shards((), out / "data" / split)  # a split that is not required, and not there


def _sort_out(shard: Shard, reasons: Mapping[int, str], target: Path, apart: pq.ParquetWriter) -> None:
    start = 0
    with pq.ParquetWriter(target, SCHEMA, compression="zstd") as good:
        for table in shard_tables(shard.path):
            rows = table.select(SCHEMA.names)  # by name: a shard may hold them in another order
            reason = pa.array([reasons.get(start + n) for n in range(len(rows))], pa.string())
            good.write_table(rows.filter(reason.is_null()))
            if reason.null_count < len(rows):
                rows = rows.append_column("reason", reason).append_column("split", pa.array([shard.split] * len(rows)))
                apart.write_table(rows.filter(reason.is_valid()))
            start += len(rows)
