"""The profile for a user's data: every value is computed from the rows and the base, and explained beside it."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from vismem.config import DEFAULT_BASE, Config
from vismem.config.data import Split
from vismem.data.answer_forms import AnswerKind, answer_form
from vismem.data.collate import ANSWER_MARK, target_text
from vismem.data.instructions import instruction_for
from vismem.init.bases import Base
from vismem.init.rows import Row

MARK = "# Written by `vismem init`"  # how a profile that may be written again begins
LARGE = "qwen2_5_vl_7b"  # the profile with the paper's settings, for all families
PASSES = 8  # of the warm start over the train split; the default of a large one is about two
KEPT = 0.95  # of the test rows: what `validate` may set apart at most, see validate.max_quarantined
ROOM = 8  # tokens beyond the longest reference answer


@dataclass(frozen=True)
class Setting:
    """One value of the profile. `why` says why it is this one for these rows and this base."""

    key: str  # dotted
    value: Any
    why: str


def settings_of(
    name: str, base: Base, rows: Mapping[Split, list[Row]], config: Config, images: Path, seed: int
) -> list[Setting]:
    """The settings of a profile in the order of `params.yaml`. `config` is what the profile is laid over."""
    train, test, grpo = len(rows["train"]), len(rows["test"]), config.grpo
    longest = base.longest(target_text(row.sample) for split in rows.values() for row in split)
    counted = "by the base's tokenizer" if base.tokenizer else "guessed from its characters"
    tokens = answer_tokens(longest, config)
    limit = f"your longest answer has {longest} ({counted}), and the base's own words need room too"
    sources = [
        {"kind": "jsonl", "path": f"data/{name}/{split}.jsonl", "images": images.as_posix(), "split": split}
        for split in rows
    ]
    if base.small:
        batch, at_most = config.stage1.warm_start.batch_size, "the default at most"
        warm, each = bounded(PASSES * train // batch, config.stage1.warm_start.steps), max(1, train // grpo.batch_size)
        passed = f"one pass over {train} questions, {grpo.batch_size} per step; {at_most}"
        steps = [
            Setting("stage1.steps", min(config.stage1.steps or each, each), passed),
            Setting(
                "stage1.warm_start.steps",
                warm,
                f"{PASSES} passes over {train} questions, {batch} per step; 10 at least, {at_most}",
            ),
            Setting("stage2.steps", min(config.stage2.steps or each, each), passed),
        ]
    else:
        passes = grpo.epochs * max(1, train // grpo.batch_size)
        passed = f"{grpo.epochs} passes over {train} questions, {grpo.batch_size} per step, are {passes} steps"
        steps = [Setting("stage1.steps", 0, passed), Setting("stage2.steps", 0, passed)]
    return [
        Setting("seed", seed, "also decides which images are in which split"),
        Setting("prepare.sources", sources, f"your questions as `vismem init` split them, {counts_of(rows)}"),
        *_instructions(rows, config),
        Setting(
            "base.model", base.model, "as --base named it" if base.model != DEFAULT_BASE else "no --base was named"
        ),
        Setting("grpo.max_new_tokens", tokens, limit),
        *steps,
        Setting("evaluate.max_new_tokens", tokens, "as in training"),
        Setting("gate.min_items", min_items(test, config), _gate_reason(test, config)),
        Setting("registry.experiment", f"vismem-{name}", "a name of its own, so that runs do not mix"),
        Setting("registry.model_name", f"vismem-{name}", "a name of its own: it never displaces another's champion"),
        *(
            []
            if base.graphs
            else [Setting("export.graphs", False, "Qwen2.5-VL alone has graphs; `vismem api` serves others")]
        ),
        Setting("deploy.model_name", f"vismem_{name.replace('-', '_')}", "a name of its own, for the same reason"),
    ]


def _instructions(rows: Mapping[Split, list[Row]], config: Config) -> Iterator[Setting]:
    """The instruction for each kind of answer that the rows ask for; none where the base is told nothing."""
    kinds = kinds_of(chain.from_iterable(rows.values()))
    for kind in AnswerKind:
        if kinds[kind] and (text := instruction_for(kind, config.prepare.instructions)):
            why = f'{kinds[kind]} of your questions are answered so; the answer is read behind "{ANSWER_MARK}"'
            yield Setting(f"prepare.instructions.{kind.value}", text, why)


def kinds_of(rows: Iterable[Row]) -> Counter[AnswerKind]:
    """How many rows ask for each kind of answer."""
    asked = (row.sample for row in rows)
    return Counter(answer_form(sample.question, sample.answer, sample.choices).kind for sample in asked)


def answer_tokens(longest: int, config: Config) -> int:
    """The limit of an answer's tokens: what `config` leaves room for, or the longest answer in a multiple of 8."""
    return max(config.grpo.max_new_tokens, _up(longest + ROOM))


def min_items(test: int, config: Config) -> int:
    """How many scored test questions the gate asks for: nearly all of them, and never fewer than the default."""
    return max(config.gate.min_items, int(KEPT * test))


def bounded(steps: int, most: int) -> int:
    """Steps between 10 and the default, or the default where that is lower."""
    return min(most, max(10, steps))


def render_profile(name: str, command: str, base: Base, settings: Sequence[Setting]) -> str:
    """The profile's text: above each key what it means, and why it has its value."""
    lines = [
        f"{MARK} for your own data: `vismem repro --profile {name}` runs it in runs/{name}/.",
        *_comment(f"Made by: {_printable(command)}"),
        *_comment(
            "It overlays params.yaml. Above each key stands what it means, then why it has its value for your data. "
            "Change what you like; what is not here is as in params.yaml."
        ),
    ]
    if not base.small:
        lines += [
            *_comment("Below it lies the profile with the paper's settings for large models."),
            f"extends: {LARGE}",
        ]
    shown = ""
    for setting in settings:
        *place, key = setting.key.split(".")
        for depth in range(len(place)):
            here = ".".join(place[: depth + 1])
            if not f"{shown}.".startswith(f"{here}."):
                lines += ([""] if depth == 0 else []) + [f"{'  ' * depth}{place[depth]}:"]
        shown, indent = ".".join(place), "  " * len(place)
        explained = [*_comment(_meaning(setting.key)), *_comment(f"Here: {setting.why}.")]
        lines += [f"{indent}{line}" for line in (*explained, *_lines(key, setting.value))]
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, list):
        yield f"{key}:"
        yield from (f"  - {_flow(item)}" for item in value)
    else:
        yield f"{key}: {_flow(value)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 112, break_long_words=False, break_on_hyphens=False)]


def _printable(text: str) -> str:
    """The text without what ends a line of YAML, or may not be in one: names of files may hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _meaning(key: str) -> str:
    """What a dotted key means, with its unit: its description, or its section's; without the value's source."""
    section: Any = Config
    about = ""
    for part in key.split("."):
        field = section.by_key()[part]
        about = field.description or (section.__doc__ or "").splitlines()[0]
        section = field.annotation
    meaning = about.partition(" [")[0].rstrip(".")
    return f"{meaning[0].upper()}{meaning[1:]}."


def counts_of(rows: Mapping[Split, list[Row]]) -> str:
    """ "42 train, 6 validation, 12 test"."""
    return ", ".join(f"{len(of)} {split}" for split, of in rows.items())


def _gate_reason(test: int, config: Config) -> str:
    needed = config.gate.min_items
    if test < needed:
        return (
            f"the test split has {test}, too few to show that one model is better than another, so the gate will "
            f"refuse the model; it is served all the same, for trying. About {needed} test questions are needed"
        )
    return f"{KEPT:.0%} of the {test} test questions, so that a run that lost some is refused"


def _up(tokens: int) -> int:
    return -(-tokens // 8) * 8
