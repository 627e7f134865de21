"""The rules of the data, as expectations of Great Expectations on columns of the facts; `Project.judge` asks them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vismem.config import Severity, ValidateConfig
from vismem.data.sample import Capability
from vismem.errors import UserError, nearest
from vismem.records import DataRule


@dataclass(frozen=True)
class Rule:
    """One expectation on one column of one table (`shards`, `rows`, `splits` or `total`)."""

    name: str
    severity: Severity
    table: str
    column: str
    expectation: str  # its type, as Great Expectations writes it in a suite
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
    value: Any = None  # what an expectation about a column as a whole observed
    message: str = ""  # what is said of it, once the other tables are judged
    places: tuple[str, ...] = ()  # the first rows that break it, each with what is said of it

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

    def record(self) -> DataRule:
        """As it is kept."""
        rule = self.rule
        return DataRule(
            name=rule.name,
            severity=rule.severity.value,
            success=self.success,
            observed=self.observed,
            message=self.message,
        )


NULL, BETWEEN, IN_SET = (f"expect_column_values_to_be_{kind}" for kind in ("null", "between", "in_set"))


def rules(config: ValidateConfig) -> tuple[Rule, ...]:
    """All rules that VisMem brings, in the order of the report; UserError for a severity that none can have."""
    return with_severities(_rules(config), config.severities, "validate.severities")


def with_severities(rules: Iterable[Rule], severities: Mapping[str, Severity], key: str) -> tuple[Rule, ...]:
    """The rules with the severities that the parameter `key` gives them; UserError for one that none can have."""
    found = {rule.name: rule for rule in rules}
    for name, severity in severities.items():
        if name not in found:
            raise UserError(f"{key}: no rule '{name}'{nearest(name, found)}; rules: {', '.join(found)}")
        if severity is Severity.QUARANTINE and found[name].table != "rows":
            raise UserError(f"{key}.{name}: it judges no single row to set apart: error or warning")
        found[name] = replace(found[name], severity=severity)
    return tuple(found.values())


def _rules(config: ValidateConfig) -> tuple[Rule, ...]:
    low, high, chars = config.min_pixels, config.max_pixels, config.max_question_chars
    error, apart, warning = Severity.ERROR, Severity.QUARANTINE, Severity.WARNING
    label, drift = config.max_label_share, config.max_task_drift
    bad, lost = config.max_quarantined, config.max_split_loss
    aspect, contrast = config.max_aspect, config.min_contrast
    capabilities = [capability.value for capability in Capability]
    return (
        Rule("schema", error, "shards", "fault", NULL, {}, "every shard has the sample's columns", "{shard}: {fault}"),
        Rule("non_empty_splits", error, "splits", "required_rows", BETWEEN, {"min_value": 1},
             "required splits have good rows", "split '{split}' has no good rows"),
        Rule("no_leakage", error, "rows", "leak", NULL, {},
             "no image and no group of one split is in another", "its image or its group is also in {leak}"),
        Rule("quarantined_share", error, "total", "quarantined_share", BETWEEN, {"max_value": bad},
             f"at most {bad:.1%} of the rows are bad",
             "{quarantined:.0f} of {rows:.0f} rows are bad: {quarantined_share:.1%}"),
        Rule("split_loss", error, "splits", "lost_share", BETWEEN, {"max_value": lost},
             f"at most {lost:.1%} of a split's rows are bad", "split '{split}' loses {lost_share:.1%} of its rows"),
        Rule("questions_unseen", apart, "rows", "asked_in", NULL, {},
             "no question of one split, with its answer, is asked about an image that looks alike in another",
             "is asked, with the same answer, about an image that looks alike at {asked_in}"),
        Rule("answers_agree", apart, "rows", "conflict", NULL, {},
             "the same question about the same images has one answer", "answered otherwise at {conflict}"),
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
        Rule("image_aspect", apart, "rows", "aspect", BETWEEN, {"max_value": aspect},
             f"no side of an image is over {aspect:g} times the other",
             f"one side is {{aspect:.0f}} times the other, more than {aspect:g}"),
        Rule("texts_readable", apart, "rows", "encoding_fault", NULL, {},
             "no text was damaged by a wrong encoding", "{encoding_fault}"),
        Rule("question_length", apart, "rows", "question_chars", BETWEEN, {"min_value": 1, "max_value": chars},
             f"questions have 1 to {chars} characters", f"{{question_chars}} characters, not 1 to {chars}"),
        Rule("texts_plain", apart, "rows", "token_fault", NULL, {}, "no text holds one of the base's own tokens",
             "{token_fault}: one of the base's own tokens"),
        Rule("marks_match", apart, "rows", "mark_fault", NULL, {},
             "a question has a mark <image> for each image, or none", "{mark_fault}"),
        Rule("answers_filled", apart, "rows", "answer_chars", BETWEEN, {"min_value": 1},
             "every row has an answer", "empty answer"),
        Rule("answer_length", apart, "rows", "answer_chars", BETWEEN, {"max_value": chars},
             f"answers have at most {chars} characters", f"an answer of {{answer_chars}} characters, over {chars}"),
        Rule("answers_among_choices", apart, "rows", "answer_listed", IN_SET, {"value_set": [True]},
             "an answer is one of its choices, where there are any", "the answer '{answer}' is none of the choices"),
        Rule("capability_known", apart, "rows", "capability", IN_SET, {"value_set": capabilities},
             "the capability is one of the paper's three", "unknown capability '{capability}'"),
        Rule("near_duplicates", warning, "rows", "near_leak", NULL, {},
             "no image looks like one of another split", "shows an image that looks like one at {near_leak}"),
        Rule("rows_distinct", warning, "rows", "copy_of", NULL, {}, "no row is there twice",
             "same images, question and answer as {copy_of}"),
        Rule("images_not_blank", warning, "rows", "contrast", BETWEEN, {"min_value": contrast},
             f"the values of an image differ by at least {contrast} of 255",
             f"a blank image: its values differ by {{contrast:.0f}}, less than {contrast}"),
        Rule("choices_distinct", warning, "rows", "choice_fault", NULL, {}, "choices are two or more, all different",
             "{choice_fault}"),
        Rule("texts_without_markup", warning, "rows", "markup_fault", NULL, {},
             "no text holds mark-up: another model's tokens, HTML", "{markup_fault}"),
        Rule("answers_meant", warning, "rows", "answer_fault", NULL, {},
             "no answer stands for a missing one", "the answer '{answer_fault}' stands for a missing one"),
        Rule("label_balance", warning, "splits", "label_share", BETWEEN, {"max_value": label},
             f"no answer has more than {label:.0%} of a split",
             "split '{split}': {label_share:.0%} of the answers are '{label}'"),
        Rule("task_drift", warning, "splits", "task_drift", BETWEEN, {"max_value": drift},
             f"the task mix is within {drift:.0%} (total variation) of the profile",
             "split '{split}': total variation distance {task_drift:.1%}"),
    )  # fmt: skip
