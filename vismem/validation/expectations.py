"""The rules of the data and their judge, Great Expectations; this is the only module that imports it.

It is imported when the judge is made (seconds), with its telemetry off.
"""

import os
from collections.abc import Sequence
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
    span: tuple[float, float] | None = None  # min and max of a numeric column

    @property
    def observed(self) -> str:
        """What was seen, in few words."""
        low, high = self.span or (0.0, 0.0)
        value = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        seen = [f"{self.rule.column} {value}"] if self.span else []
        counted = [f"{len(self.rows):,} of {self.judged:,} {self.rule.table} break it"] if self.judged != 1 else []
        return ", ".join(seen + counted) or "nothing to judge"


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
             "no image or video of one split is in another", "shows an image or video that is also in {leak}"),
        Rule("quarantined_share", error, "total", "quarantined_share", BETWEEN, {"max_value": bad},
             f"at most {bad:.1%} of the rows are bad",
             "{quarantined:.0f} of {rows:.0f} rows are bad: {quarantined_share:.1%}"),
        Rule("fields_filled", apart, "rows", "null_fault", NULL, {}, "no text field is null", "{null_fault} is null"),
        Rule("ids_filled", apart, "rows", "id_chars", BETWEEN, {"min_value": 1}, "every row has an id", "empty id"),
        Rule("ids_unique", apart, "rows", "duplicate_of", NULL, {},
             "an id is used once", "same id as {duplicate_of}"),
        Rule("images_present", apart, "rows", "images", BETWEEN, {"min_value": 1},
             "every row has an image or a video", "no image and no video"),
        Rule("images_decode", apart, "rows", "image_fault", NULL, {}, "images and videos' frames decode",
             "{image_fault}"),
        Rule("image_least_side", apart, "rows", "least_side", BETWEEN, {"min_value": low},
             f"image sides have at least {low} pixels", f"a side of {{least_side:.0f}} pixels, less than {low}"),
        Rule("image_largest_side", apart, "rows", "largest_side", BETWEEN, {"max_value": high},
             f"image sides have at most {high} pixels", f"a side of {{largest_side:.0f}} pixels, more than {high}"),
        Rule("question_length", apart, "rows", "question_chars", BETWEEN, {"min_value": 1, "max_value": chars},
             f"questions have 1 to {chars} characters", f"{{question_chars}} characters, not 1 to {chars}"),
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


class Judge:
    """Great Expectations with a context in memory."""

    def __init__(self) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "False"
        import great_expectations as gx
        from great_expectations.data_context.types import base

        # Its own default config makes a temporary folder for Data Docs (which load scripts from the net) and leaves it.
        config = base.DataContextConfig(
            store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            progress_bars=base.ProgressBarsConfig(globally=False),
            analytics_enabled=False,
        )
        self._gx = gx
        self._context = gx.get_context(mode="ephemeral", project_config=config)
        self._source = self._context.data_sources.add_pandas("facts")

    def judge(self, table: str, facts: pd.DataFrame, rules: Sequence[Rule]) -> list[Verdict]:
        """Judge those of `rules` that are about `table` (a name used once); RuntimeError if one cannot be evaluated."""
        ours = [rule for rule in rules if rule.table == table]
        if facts.empty:  # passes every rule in Great Expectations as well: the splits' rule asks for rows
            return [Verdict(rule, True, 0) for rule in ours]
        gx = self._gx
        batch = self._source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all")
        suite = self._context.suites.add(
            gx.ExpectationSuite(name=table, expectations=[self._expectation(rule) for rule in ours])
        )
        definition = self._context.validation_definitions.add(
            gx.ValidationDefinition(name=table, data=batch, suite=suite)
        )
        # The judge sees only the columns it asks about, so that it need not copy the others.
        columns = list(dict.fromkeys(rule.column for rule in ours))
        found = definition.run(batch_parameters={"dataframe": facts[columns]}, result_format="COMPLETE")
        results = {result.expectation_config.meta["rule"]: result for result in found.results}
        return [_verdict(rule, results[rule.name], facts) for rule in ours]

    def _expectation(self, rule: Rule) -> Any:
        make = getattr(self._gx.expectations, rule.expectation)
        severity = "critical" if rule.severity is Severity.ERROR else "warning"
        return make(column=rule.column, severity=severity, meta={"rule": rule.name}, **rule.arguments)


def _verdict(rule: Rule, result: Any, facts: pd.DataFrame) -> Verdict:
    if "unexpected_index_list" not in result.result:  # it is left out where the evaluation itself failed
        raise RuntimeError(f"rule {rule.name} could not be evaluated: {str(result.exception_info)[:2000]}")
    values = facts[rule.column].dropna()
    numeric = rule.expectation == BETWEEN and not values.empty
    span = (float(values.min()), float(values.max())) if numeric else None
    return Verdict(rule, bool(result.success), len(facts), tuple(result.result["unexpected_index_list"]), span)
