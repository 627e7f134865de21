"""`report.html`: one self-contained page that reads offline, from metrics, predictions and plots."""

import base64
import random
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from vismem.evaluation.answers import normalise
from vismem.evaluation.arms import ARMS, VANILLA, VISMEM, Arm, label
from vismem.evaluation.metrics import CAPABILITIES, OVERALL, is_yes_no
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.summary import headline, p_value
from vismem.records import Metrics

EXAMPLES = 4  # at most, of wins and of losses
_CHIPS = {"&lt;m_I^s&gt;": ("short", "short-term memory"), "&lt;m_I^l&gt;": ("long", "long-term memory")}


def render(
    metrics: Metrics,
    predictions: Mapping[str, Sequence[Prediction]],
    plots: Mapping[str, bytes],
    pictures: Mapping[str, Sequence[bytes]],
    provenance: Mapping[str, str],
    *,
    resamples: int,
    batch_size: int,
) -> str:
    """The page. `plots`: PNGs by name; `pictures`: a sample's id to its images, at least those of `examples`.

    Everything that came from data is escaped; images are embedded.
    """
    loader = PackageLoader("vismem.evaluation", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)  # a missing figure is a fault
    environment.filters["signed"] = _signed
    groups = [OVERALL, *(name for name in CAPABILITIES if name in metrics.counts)]
    differences = [(label(VISMEM), metrics.gain)] if metrics.gain else []
    differences += [(label(arm), difference) for arm, difference in metrics.ablations.items()]
    wins, losses = disagreements(predictions)
    shown_wins, shown_losses = examples(wins, losses, metrics.seed)
    references = [normalise(answer.reference) for answer in predictions[VANILLA] if is_yes_no(answer)]
    tasks = groupby(metrics.tasks.items(), key=lambda item: item[1].capability)
    page: str = environment.get_template("report.html.j2").render(
        metrics=metrics,
        headline=headline(metrics),
        groups=groups,
        groups_yes_no=metrics.yes_no.arms[VANILLA],
        yes_is_right=100 * references.count("yes") / max(len(references), 1),
        fewest=min(task.n for task in metrics.tasks.values()),
        arms=[ARMS.get(arm) or Arm(arm, arm, "", ARMS[VANILLA].policy) for arm in metrics.arms],
        differences=differences,
        tasks_by_capability=[(capability, list(rows)) for capability, rows in tasks],
        images={"invocation": "", **{name: base64.b64encode(png).decode() for name, png in plots.items()}},
        wins=[_example(place, predictions, pictures) for place in shown_wins],
        losses=[_example(place, predictions, pictures) for place in shown_losses],
        win_count=len(wins),
        loss_count=len(losses),
        provenance=provenance,
        resamples=resamples,
        batch_size=batch_size,
        tones={"better": "up", "worse": "down", "not shown": ""},
        place=lambda position: "\N{EN DASH}" if position is None else f"{position:.2f}",
        p_value=p_value,
    )
    return page


def disagreements(predictions: Mapping[str, Sequence[Prediction]]) -> tuple[list[int], list[int]]:
    """Places of the items that VisMem alone has right, and of those that vanilla alone has right."""
    pairs = list(zip(predictions.get(VISMEM, ()), predictions[VANILLA], strict=False))
    wins = [place for place, (arm, reference) in enumerate(pairs) if arm.score > reference.score]
    losses = [place for place, (arm, reference) in enumerate(pairs) if arm.score < reference.score]
    return wins, losses


def examples(wins: Sequence[int], losses: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Draw the places to show: as many wins as losses; where one kind is missing, the other's all the same."""
    rng = random.Random(seed)
    many = min(EXAMPLES, len(wins) or EXAMPLES, len(losses) or EXAMPLES)
    shown_wins, shown_losses = (sorted(rng.sample(places, min(many, len(places)))) for places in (wins, losses))
    return shown_wins, shown_losses


def mark_memories(marked_text: str) -> Markup:
    """The answer as HTML, each invocation a coloured chip, everything else escaped."""
    text = str(escape(marked_text))
    for token, (kind, words) in _CHIPS.items():
        text = text.replace(token, f' <span class="chip {kind}">{words}</span> ')
    return Markup(re.sub(r"\s{2,}", " ", text).strip())


def _example(
    place: int, predictions: Mapping[str, Sequence[Prediction]], pictures: Mapping[str, Sequence[bytes]]
) -> dict[str, Any]:
    answers = {arm: predictions[arm][place] for arm in (VISMEM, VANILLA)}
    asked = answers[VANILLA]
    lines = [
        {"label": label(arm), "text": mark_memories(answer.marked_text), "correct": answer.score == 1.0}
        for arm, answer in answers.items()
    ]
    images = [_data_uri(image) for image in pictures.get(asked.id, ())]
    asked_for = {"task": asked.task, "question": asked.question, "reference": asked.reference}
    return {**asked_for, "lines": lines, "images": images}


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _signed(value: float) -> str:
    """With its sign, a true minus: as wide as a plus."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
