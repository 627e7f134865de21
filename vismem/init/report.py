"""What `vismem init` tells: what the rows are, what was left out, what to watch, and what to run next."""

from collections import Counter
from collections.abc import Iterator, Sequence

from vismem.config import Config
from vismem.init.bases import Base
from vismem.init.profile import counts_of, kinds_of
from vismem.init.rows import Row, Rows
from vismem.init.splits import SHARES, Splits, grouped
from vismem.progress import about

RECORD = "init.json"  # in data/NAME: where its rows came from, and all that was left out
SHOWN = 5  # rows of a kind that are named
ENOUGH_TRAIN = 200  # train questions below which a memory learns next to nothing


def describe(
    program: str,
    name: str,
    rows: Rows,
    splits: Splits,
    base: Base,
    seconds: float,
    below: Config,
    wrote: Sequence[str],
) -> str:
    """The text for the terminal. `program` is what the user types for `vismem`, `seconds` how long a
    small base takes, `wrote` where it all is."""
    kept = [row for of in splits.rows.values() for row in of]
    left_out = {"bad": rows.bad, "asked before": rows.duplicates, "with an image of another split": splits.leaks}
    counted = [f"{len(lines)} {what}" for what, lines in left_out.items() if lines]
    parts = [
        f"{rows.total} rows, {len(kept)} good" + "".join(f", {one}" for one in counted),
        *(line for what, lines in left_out.items() for line in _listed(what, lines, f"{wrote[0]}/{RECORD}")),
        *(
            [f"  ids        given to {rows.named} {'row' if rows.named == 1 else 'rows'} that had none"]
            if rows.named
            else []
        ),
        f"  images     {_images(kept)}",
        f"  answers    {_answers(kept)}",
        f"  splits     {counts_of(splits.rows)}: {_made(splits)}",
        "",
        *(
            f"! {line}"
            for line in [
                *_notes(splits, below),
                *_doubts(kept),
                *base.resized([row for row in kept if not row.doubts]),
                *filter(None, [base.unknown]),
            ]
        ),
        "",
        f"Wrote {wrote[0]}/ and {wrote[1]}, which explains every value.",
        "",
        *_next(program, name, base, seconds, all(row.doubts for row in kept)),
    ]
    return "\n".join(line for n, line in enumerate(parts) if line or parts[n - 1])


def _listed(what: str, lines: Sequence[str], record: str) -> Iterator[str]:
    if lines:
        yield f"  {what}:"
        yield from (f"    {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"    and {len(lines) - SHOWN} more, all in {record}"


def _images(rows: Sequence[Row]) -> str:
    sides = Counter(size for row in rows for size in row.sides)
    pictures = {picture for row in rows for picture in row.pictures}
    if not sides:
        return "none"
    (first, count), *more = sides.most_common()
    sizes = "{} x {} pixels".format(*first)
    if more:
        low, high = ([side(size[n] for size in sides) for n in (0, 1)] for side in (min, max))
        sizes = f"widths {low[0]} to {high[0]}, heights {low[1]} to {high[1]} pixels; {sizes} {count} times"
    return f"{len(pictures)} different in {len(rows)} questions, {sizes}"


def _answers(rows: Sequence[Row]) -> str:
    answer, count = Counter(row.sample.answer.casefold() for row in rows).most_common(1)[0]
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds_of(rows).most_common())
    return f"{listed}; '{answer}' is the most frequent, {count / len(rows):.0%}: who always says it scores that"


def _made(splits: Splits) -> str:
    if not splits.made:
        return "as the data names them; no image is in two"
    shares = " and ".join(f"{SHARES[split]:.0%} for {split}" for split in splits.made)
    return f"{shares}, by a hash of the images; no image is in two"


def _notes(splits: Splits, below: Config) -> Iterator[str]:
    test, train, needed = len(splits.rows["test"]), len(splits.rows["train"]), below.gate.min_items
    if test < needed:
        yield (
            f"{test} test questions are too few to show that one model is better than another: the gate asks for "
            f"{needed} (gate.min_items), and will refuse the model. That is about {needed / SHARES['test']:,.0f} "
            "questions in all, or a file for --test"
        )
    elif (clusters := len(grouped(splits.rows["test"]))) < below.gate.min_clusters:
        yield (
            f"the {test} test questions are about {clusters} images or groups, and those count: the gate asks for "
            f"{below.gate.min_clusters} (gate.min_clusters), and will refuse the model"
        )
    if train < ENOUGH_TRAIN:
        yield f"{train} train questions are enough to see that all steps work, and too few to learn from"
    for split, rows in splits.rows.items():
        answer, count = Counter(row.sample.answer.casefold() for row in rows).most_common(1)[0]
        if count / len(rows) > below.validate_.max_label_share and len(rows) > 1:
            yield f"'{answer}' is the answer to {count / len(rows):.0%} of the {split} questions"


def _doubts(rows: Sequence[Row]) -> Iterator[str]:
    doubted = [row for row in rows if row.doubts]
    if doubted:
        first = doubted[0]
        yield f"the base cannot read {len(doubted)} of {len(rows)} questions. {first.where}: {'; '.join(first.doubts)}"


def _next(program: str, name: str, base: Base, seconds: float, unreadable: bool) -> Iterator[str]:
    if unreadable:
        yield f"{base.model} can learn nothing from these questions: choose another model with `--base`, and `--force`"
        return
    if base.small:
        yield f"Next, {about(seconds)} on two CPU cores:"
    else:
        fits = f"`{program} plan --profile {name} --gpus 8xH100` says what fits, and how fast"
        yield f"Next, on a machine with a GPU ({fits}):"
    yield f"  {program} repro --profile {name}"
    yield f"  {program} summary --profile {name}"
