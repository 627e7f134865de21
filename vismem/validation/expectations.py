"""The rules of the data and their judge, Great Expectations; this is the only module that imports it.

It is imported when it judges (seconds), with its telemetry off.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pandas as pd

from vismem.config import ValidateConfig
from vismem.data.sample import Capability


class Severity(StrEnum):
    """What a broken rule does: stop the pipeline, set the rows that break it apart, or only say so."""

    ERROR = "error"
    QUARANTINE = "quarantine"
    WARNING = "warning"


@dataclass(frozen=True)
class Rule:
    """One expectation on one column of one table (`shards`, `rows`, `splits` or `total`)."""

    name: str
    severity: Severity
    table: str
    column: str
    expectation: str  # a class of great_expectations.expectations
    arguments: dict[str, Any] = field(default_factory=dict)
    holds: str = ""  # what must hold, in words
    broken: str = ""  # what is said of a row that breaks it; {column} names stand for that row's facts


@dataclass(frozen=True)
class Verdict:
    """What the judge found. `rows` are the index values of the table's rows that break the rule."""

    rule: Rule
    success: bool
    judged: int
    rows: tuple[int, ...] = ()
    span: tuple[float, ...] = ()  # min and max of a numeric column
    message: str = ""  # what is said of it, once the other tables are judged

    @property
    def observed(self) -> str:
        """What was seen: the min and max value, how much was judged, and how much of it breaks the rule."""
        column, table = self.rule.column, self.rule.table
        show = (
            "{:.1%}" if column.endswith(("share", "drift")) else "{:,.0f} px" if column.endswith("side") else "{:,.0f}"
        )
        span = dict.fromkeys(show.format(value) for value in self.span)
        seen = [f"{column.replace('chars', 'characters').replace('_', ' ')} {' to '.join(span)}"] if span else []
        broken = f"{len(self.rows):,} of {self.judged:,} {table} break it" if self.rows else ""
        counted = [broken or f"{self.judged:,} {table} judged"] if self.judged != 1 else []
        return "; ".join(seen + counted) or "nothing to judge"


NULL, BETWEEN, IN_SET = "ExpectColumnValuesToBeNull", "ExpectColumnValuesToBeBetween", "ExpectColumnValuesToBeInSet"


def rules(config: ValidateConfig) -> tuple[Rule, ...]:
    """All rules, in the order of the report."""
    low, high, chars = config.min_pixels, config.max_pixels, config.max_question_chars
    error, apart, warning = Severity.ERROR, Severity.QUARANTINE, Severity.WARNING
    label, drift, bad = config.max_label_share, config.max_task_drift, config.max_quarantined
    capabilities = [capability.value for capability in Capability]
    return (
        Rule("schema", error, "shards", "fault", NULL, {}, "every shard has the sample's columns", "{shard}: {fault}"),
        Rule("non_empty_splits", error, "splits", "required_rows", BETWEEN, {"min_value": 1},
             "required splits have good rows", "split '{split}' has no good rows"),
        Rule("no_leakage", error, "rows", "leak", NULL, {},
             "no image of one split is in another", "shows an image that is also in {leak}"),
        Rule("quarantined_share", error, "total", "quarantined_share", BETWEEN, {"max_value": bad},
             f"at most {bad:.1%} of the rows are bad",
             "{quarantined:.0f} of {rows:.0f} rows are bad: {quarantined_share:.1%}"),
        Rule("fields_filled", apart, "rows", "null_fault", NULL, {}, "no text field is null", "{null_fault} is null"),
        Rule("ids_filled", apart, "rows", "id_chars", BETWEEN, {"min_value": 1}, "every row has an id", "empty id"),
        Rule("ids_unique", apart, "rows", "duplicate_of", NULL, {},
             "an id is used once", "same id as {duplicate_of}"),
        Rule("images_present", apart, "rows", "images", BETWEEN, {"min_value": 1},
             "every row has an image", "no image: a released model answers questions about images"),
        Rule("no_videos", apart, "rows", "videos", BETWEEN, {"max_value": 0},
             "no row has a video", "has a video: a released model takes images only"),
        Rule("images_decode", apart, "rows", "image_fault", NULL, {}, "images decode", "{image_fault}"),
        Rule("image_min_side", apart, "rows", "min_side", BETWEEN, {"min_value": low},
             f"image sides have at least {low} pixels", f"a side of {{min_side:.0f}} pixels, less than {low}"),
        Rule("image_max_side", apart, "rows", "max_side", BETWEEN, {"max_value": high},
             f"image sides have at most {high} pixels", f"a side of {{max_side:.0f}} pixels, more than {high}"),
        Rule("question_length", apart, "rows", "question_chars", BETWEEN, {"min_value": 1, "max_value": chars},
             f"questions have 1 to {chars} characters", f"{{question_chars}} characters, not 1 to {chars}"),
        Rule("texts_plain", apart, "rows", "token_fault", NULL, {}, "no text holds one of the base's own tokens",
             "{token_fault}: one of the base's own tokens"),
        Rule("answers_filled", apart, "rows", "answer_chars", BETWEEN, {"min_value": 1},
             "every row has an answer", "empty answer"),
        Rule("answers_among_choices", apart, "rows", "answer_listed", IN_SET, {"value_set": [True]},
             "an answer is one of its choices, where there are any", "the answer '{answer}' is none of the choices"),
        Rule("capability_known", apart, "rows", "capability", IN_SET, {"value_set": capabilities},
             "the capability is one of the paper's three", "unknown capability '{capability}'"),
        Rule("label_balance", warning, "splits", "label_share", BETWEEN, {"max_value": label},
             f"no answer has more than {label:.0%} of a split",
             "split '{split}': {label_share:.0%} of the answers are '{label}'"),
        Rule("task_drift", warning, "splits", "task_drift", BETWEEN, {"max_value": drift},
             f"the task mix is within {drift:.0%} (total variation) of the profile",
             "split '{split}': total variation distance {task_drift:.1%}"),
    )  # fmt: skip


def judge(tables: Mapping[str, pd.DataFrame], rules: Sequence[Rule]) -> list[Verdict]:
    """Judge each table by the rules that are about it; RuntimeError if one cannot be evaluated."""
    os.environ["GX_ANALYTICS_ENABLED"] = "False"
    import great_expectations as gx
    from great_expectations.data_context.types import base

    # Its own default config makes a temporary folder for Data Docs (which load scripts from the net) and leaves it.
    config = base.DataContextConfig(
        store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        progress_bars=base.ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    context = gx.get_context(mode="ephemeral", project_config=config)
    source = context.data_sources.add_pandas("facts")
    verdicts: list[Verdict] = []
    for table, facts in tables.items():
        ours = [rule for rule in rules if rule.table == table]
        if facts.empty:  # passes every rule in Great Expectations as well: the splits' rule asks for rows
            verdicts += [Verdict(rule, True, 0) for rule in ours]
            continue
        suite = context.suites.add(gx.ExpectationSuite(name=table, expectations=[_expectation(gx, r) for r in ours]))
        batch = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all")
        definition = gx.ValidationDefinition(name=table, data=batch, suite=suite)
        # The judge sees only the columns it asks about, so that it need not copy the others.
        seen = {"dataframe": facts[list(dict.fromkeys(rule.column for rule in ours))]}
        found = context.validation_definitions.add(definition).run(batch_parameters=seen, result_format="COMPLETE")
        results = {result.expectation_config.meta["rule"]: result for result in found.results}
        verdicts += [_verdict(rule, results[rule.name], facts) for rule in ours]
    return verdicts


def _expectation(gx: Any, rule: Rule) -> Any:
    severity = "critical" if rule.severity is Severity.ERROR else "warning"
    make = getattr(gx.expectations, rule.expectation)
    return make(column=rule.column, severity=severity, meta={"rule": rule.name}, **rule.arguments)


def _verdict(rule: Rule, result: Any, facts: pd.DataFrame) -> Verdict:
    if "unexpected_index_list" not in result.result:  # it is left out where the evaluation itself failed
        raise RuntimeError(f"rule {rule.name} could not be evaluated: {str(result.exception_info)[:2000]}")
    values = facts[rule.column].dropna()
    span = (float(values.min()), float(values.max())) if rule.expectation == BETWEEN and not values.empty else ()
    return Verdict(rule, bool(result.success), len(facts), tuple(result.result["unexpected_index_list"]), span)
