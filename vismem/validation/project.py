"""Great Expectations, which judges the facts, and the project that it leaves: facts, suites, checkpoint, Data Docs.

This is the only module that imports it: late (it takes seconds), with its telemetry off.
"""

import html
import json
import os
import re
import runpy
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pandas.api.types import is_numeric_dtype

from vismem.config import Severity
from vismem.errors import UserError, nearest, one_line
from vismem.files import read_json
from vismem.validation.expectations import BETWEEN, Rule, Verdict

SEVERITIES = {Severity.ERROR: "critical", Severity.QUARANTINE: "warning", Severity.WARNING: "info"}  # there, ours
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DRAWN = re.compile(r"(?P<id>\b[\da-f]{8}-[\da-f]{4}-4[\da-f]{3}-[\da-f]{4}-[\da-f]{12}\b)|\b\d{8}T\d{6}\.\d{6}Z")
# No network, whatever pages or data ask for; and what is needed of the style sheets that would be loaded.
OFFLINE = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
form-action 'none'; base-uri 'none'">
<style>body { font: 15px/1.5 system-ui, sans-serif; margin: 0 2em 3em; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { border: 1px solid #8886; padding: 4px 10px; }
footer, .navbar, .cooltip .top { display: none; } .fa-exclamation-triangle::before { content: "!"; }
.fa-check-circle::before { content: "\\2713"; color: #080; } .fa-times::before { content: "\\2717"; color: #c00; }
</style></head>"""


class Project:
    """A project of Great Expectations in the empty folder `folder/gx`, and the rules that a user adds in it."""

    def __init__(self, folder: Path, plugins: Iterable[Path] = ()) -> None:
        """Make the project and register the expectation classes of `plugins`. UserError for one that fails."""
        os.environ["GX_ANALYTICS_ENABLED"] = "False"
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        self.folder = folder.absolute() / "gx"
        (self.folder / "facts").mkdir(parents=True)
        self.context = gx.get_context(mode="file", project_root_dir=folder.absolute())
        self.context.variables.progress_bars = ProgressBarsConfig(globally=False)
        self.context.variables.save()
        self.source = self.context.data_sources.add_pandas_filesystem("facts", base_directory=self.folder / "facts")
        self.judged: list[Any] = []  # validation definitions
        for path in plugins:
            try:  # from where Great Expectations looks for it
                runpy.run_path(str(shutil.copy(path, self.folder / "plugins" / path.name)), run_name=path.stem)
            except Exception as error:
                raise UserError(f"validate.plugins: {path}: {type(error).__name__}: {error}") from error

    def own_rules(self, path: Path, columns: Iterable[str], taken: Iterable[str]) -> tuple[Rule, ...]:
        """The rules of a file of expectations, on these columns, with names that are not `taken`; or UserError."""
        from great_expectations.expectations import expectation as kinds
        from great_expectations.expectations.registry import list_registered_expectation_implementations as types

        of_rows = kinds.ColumnMapExpectation, kinds.ColumnPairMapExpectation, kinds.MulticolumnMapExpectation
        found = list[Rule]()
        for number, entry in enumerate(_entries(path), start=1):
            where = f"{path}, expectation {number}"
            rule = _own_rule(entry, where, set(columns))
            if rule.expectation not in types():
                raise UserError(f"{where}: no expectation '{rule.expectation}'{nearest(rule.expectation, types())}")
            try:
                made = _expectation(rule)
            except Exception as error:  # noqa: BLE001 - pydantic's, and whatever a class of the user's raises
                raise UserError(f"{where}: {rule.expectation}: {one_line(error)}") from None
            if rule.severity is Severity.QUARANTINE and not isinstance(made, of_rows):
                raise UserError(f"{where}: {rule.expectation} judges no single row to set apart: critical or info")
            if rule.name in {*taken, *(other.name for other in found)}:
                raise UserError(f"{where}: there is another rule '{rule.name}': give this one `meta: {{rule: NAME}}`")
            found.append(rule)
        return tuple(found)

    def judge(self, tables: Mapping[str, pd.DataFrame], rules: Sequence[Rule]) -> list[Verdict]:
        """Save each table and judge it by the rules about it; UserError if one cannot be evaluated."""
        import great_expectations as gx
        from great_expectations.core.run_identifier import RunIdentifier

        verdicts: list[Verdict] = []
        for table, facts in tables.items():
            ours = [rule for rule in rules if rule.table == table]
            if facts.empty:  # passes every rule in Great Expectations as well: the splits' rule asks for rows
                verdicts += [Verdict(rule, True, 0) for rule in ours]
                continue
            facts.to_parquet(self.folder / "facts" / f"{table}.parquet", index=False)
            suite = gx.ExpectationSuite(name=table, expectations=[_expectation(rule) for rule in ours])
            batch = self.source.add_parquet_asset(table).add_batch_definition_path("all", path=f"{table}.parquet")
            definition = gx.ValidationDefinition(name=table, data=batch, suite=self.context.suites.add(suite))
            self.judged.append(self.context.validation_definitions.add(definition))
            found = definition.run(result_format="COMPLETE", run_id=RunIdentifier("validate", EPOCH))
            results = {result.expectation_config.meta["rule"]: result for result in found.results}
            verdicts += [_verdict(rule, results[rule.name], facts) for rule in ours]
        return verdicts

    def finish(self) -> None:
        """Add the checkpoint `data` over all that was judged, build the Data Docs, and make all of it reproducible."""
        import great_expectations as gx
        from great_expectations.checkpoint import UpdateDataDocsAction

        actions: list[Any] = [UpdateDataDocsAction(name="data_docs")]
        self.context.checkpoints.add(gx.Checkpoint(name="data", validation_definitions=self.judged, actions=actions))
        with _escaped(self.folder):
            self.context.build_data_docs()
        docs = self.folder / "uncommitted" / "data_docs" / "local_site"
        shutil.rmtree(docs / "static")  # 4 MB of fonts and how-to pictures
        links = [page.relative_to(docs).as_posix() for page in sorted(docs.glob("*/**/*.html"))]
        listed = "".join(f'<li><a href="{link}">{link}</a></li>' for link in links)
        page = f"<!doctype html><html><head><title>Data Docs</title></head><body><ul>{listed}</ul></body></html>"
        (docs / "index.html").write_text(page)  # theirs is a table that a script fills
        _settle(self.folder)


def _entries(path: Path) -> list[Any]:
    """The expectations of a file: a list, or a suite as Great Expectations saves one."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"validate.expectations: cannot read {path}: {one_line(error)}") from None
    values = values.get("expectations") if isinstance(values, dict) else values
    if not isinstance(values, list):
        raise UserError(f"{path} must hold a list of expectations, or a suite with `expectations`")
    return values


def _own_rule(entry: Any, where: str, known: set[str]) -> Rule:
    match entry:
        case {"type": str(), "kwargs": dict()} if isinstance(entry.get("meta") or {}, dict):
            arguments, meta = dict(entry["kwargs"]), entry.get("meta") or {}
        case _:
            raise UserError(
                f"{where} is not of the form {{type: expect_..., kwargs: {{...}}, severity: ..., meta: {{...}}}}"
            )
    if arguments.get("row_condition"):
        raise UserError(
            f"{where}: row_condition would run as Python: write the condition as a class, in validate.plugins"
        )
    severities = {theirs: ours for ours, theirs in SEVERITIES.items()}
    if (severity := str(entry.get("severity", "critical"))) not in severities:
        raise UserError(f"{where}: severity '{severity}': critical stops, warning sets rows apart, info only says so")
    single = [arguments.get(key) for key in ("column", "column_A", "column_B")]
    columns = [str(name) for name in (*single, *(arguments.get("column_list") or ())) if name]
    for name in (name for name in columns if name not in known):
        there = ", ".join(sorted(known))
        raise UserError(f"{where}: no column '{name}'{nearest(name, known)}; columns: {there}")
    title = meta.get("rule") or "_".join([entry["type"].removeprefix("expect_"), *columns])
    broken = ", ".join(f"{name} is '{{{name}!s:.80}}'" for name in columns)
    holds = entry.get("description") or f"{entry['type'].replace('_', ' ')}: {entry['kwargs']}"
    return Rule(
        title, severities[severity], "rows", arguments.pop("column", ""), entry["type"], arguments, holds, broken
    )


def _expectation(rule: Rule) -> Any:
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    return ExpectationConfiguration(
        type=rule.expectation,
        kwargs=({"column": rule.column} if rule.column else {}) | rule.arguments,
        meta={"rule": rule.name},
        description=rule.holds,
        severity=SEVERITIES[rule.severity],
    ).to_domain_obj()


def _verdict(rule: Rule, result: Any, facts: pd.DataFrame) -> Verdict:
    found, failed = result.result, str(result.exception_info)
    if "'raised_exception': True" in failed:
        said = failed.rpartition("'exception_message': ")[2].partition(", 'raised_exception'")[0]
        raise UserError(f"rule {rule.name} cannot be evaluated: {said}")
    values = facts.get(rule.column, pd.Series()).dropna()
    span = (
        (float(values.min()), float(values.max())) if rule.expectation == BETWEEN and is_numeric_dtype(values) else ()
    )
    rows = () if result.success else tuple(found.get("unexpected_index_list") or ())
    return Verdict(rule, bool(result.success), len(facts), rows, span, found.get("observed_value"))


@contextmanager
def _escaped(folder: Path) -> Iterator[None]:
    """A block in which the texts that Data Docs are made of are HTML: their templates escape none of the data."""
    texts = {
        path: path.read_text()
        for place in ("expectations", "uncommitted/validations")
        for path in (folder / place).rglob("*.json")
    }
    for path, text in texts.items():
        path.write_text(html.escape(text, quote=False))  # JSON itself needs none of &, < and >
    yield
    for path, text in texts.items():
        path.write_text(text)


def _settle(folder: Path) -> None:
    """Rewrite the project's texts so that the same data gives the same files, anywhere, and pages that load nothing.

    Paths become relative, times the epoch, and random identifiers numbers, but where the data holds such a text.
    """
    numbers: dict[str, str] = {}
    for path in (folder / "uncommitted" / "validations").rglob("*.json"):
        for result in read_json(path)["results"]:
            theirs = json.dumps([result["result"], result["expectation_config"]["kwargs"]])
            numbers |= {found[0]: found[0] for found in _DRAWN.finditer(theirs)}

    def settled(found: re.Match[str]) -> str:
        number = f"00000000-0000-4000-8000-{len(numbers):012d}"
        return numbers.setdefault(found[0], number if found["id"] else EPOCH.strftime("%Y%m%dT%H%M%S.%fZ"))

    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in (".parquet", ".py"):
            continue
        text = _DRAWN.sub(settled, path.read_text().replace(f"{folder.parent}{os.sep}", ""))
        if path.suffix == ".html":
            text = re.sub(r"<script\b.*?</script>|<link\b[^>]*>", "", text, flags=re.DOTALL)
            text = text.replace("</head>", OFFLINE, 1)
        path.write_text(text)
