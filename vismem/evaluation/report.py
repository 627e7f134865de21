"""`report.html`: one self-contained page that reads offline, from metrics, predictions and charts."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from vismem.config import EvaluateConfig
from vismem.data.answer_forms import normalise
from vismem.evaluation.arms import label, resolve_arms
from vismem.evaluation.benchmarks import task_names
from vismem.evaluation.metrics import cluster_of, is_yes_no
from vismem.evaluation.plots import Panel, to_svg
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.summary import headline
from vismem.models.kinds import MemoryKind
from vismem.pages import page_environment, thumbnail
from vismem.records import OVERALL, VANILLA, VISMEM, Metrics, p_value

EXAMPLES = 4  # at most, of wins and of losses
LARGEST = 10_000_000  # bytes of answers and their pictures in the page; of more, as many as fit are drawn at random
SCRIPT = Path(__file__).with_name("report.js")


class Cards:
    """Answered questions as HTML. A picture that several questions share is embedded once, as a class of the style."""

    def __init__(self, predictions: Mapping[str, Sequence[Prediction]], pictures: Mapping[str, Sequence[bytes]]):
        self.environment = page_environment("vismem.evaluation")
        self.environment.filters |= {f.__name__: f for f in (label, mark_memories, p_value, signed)}
        self.rules: list[str] = []  # of the style sheet, one per picture
        self.size = 0  # bytes of all cards and rules so far
        self._macro = self.environment.get_template("card.html.j2").module.card  # type: ignore[attr-defined]
        self._predictions, self._pictures = predictions, pictures
        self._tasks = task_names(next(iter(predictions.values())))
        self._classes: dict[bytes, str] = {}  # by the picture's sha256

    def card(self, place: int, arms: Iterable[str]) -> Markup:
        """The question at `place` as `arms` answered it; its pictures are in `rules` from now on."""
        answers = {arm: self._predictions[arm][place] for arm in arms}
        asked = next(iter(answers.values()))
        classes = [self._class(data) for data in self._pictures.get(asked.id, ())]
        card = Markup(
            self._macro(asked, self._tasks[place], answers, classes, [_memory(answer) for answer in answers.values()])
        )
        self.size += len(card.encode())
        return card

    def _class(self, data: bytes) -> str:
        """The picture's class; of one that does not decode, none."""
        if (key := hashlib.sha256(data).digest()) not in self._classes:
            address = thumbnail(data)
            self._classes[key] = f"p{len(self._classes)}" if address else ""
            self.rules += [f".{self._classes[key]}{{background-image:url({address})}}"] if address else []
            self.size += len(address or "")
        return self._classes[key]


def render(
    metrics: Metrics,
    predictions: Mapping[str, Sequence[Prediction]],
    charts: Mapping[str, Sequence[Panel]],
    pictures: Mapping[str, Sequence[bytes]],
    provenance: Mapping[str, str],
    settings: EvaluateConfig,
    suite: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page. `charts`: panels by name; `pictures`: a sample's id to its images; `suite`: rows of `suite.json`.

    Everything that came from data is escaped; pictures are embedded, as thumbnails.
    """
    cards = Cards(predictions, pictures)
    wins, losses = disagreements(predictions)
    shown_wins, shown_losses = (
        [cards.card(place, (VISMEM, VANILLA)) for place in places] for places in examples(wins, losses, metrics.seed)
    )
    answers = all_answers(cards, metrics.arms, metrics)
    references = [normalise(answer.reference) for answer in predictions[VANILLA] if is_yes_no(answer)]
    page: str = cards.environment.get_template("report.html.j2").render(
        metrics=metrics,
        headline=headline(metrics),
        groups=[OVERALL, *metrics.counts],
        fewest=min(Counter(task for task, _ in {(a.task, cluster_of(a)) for a in predictions[VANILLA]}).values()),
        yes_is_right=100 * references.count("yes") / max(len(references), 1),
        arms=resolve_arms(list(metrics.arms)),
        differences=({VISMEM: metrics.gain} if metrics.gain else {}) | metrics.ablations,
        charts={name: [(panel.words, to_svg(panel)) for panel in panels] for name, panels in charts.items()},
        wins=shown_wins,
        losses=shown_losses,
        win_count=len(wins),
        loss_count=len(losses),
        answers=answers,
        largest=LARGEST,
        picture_style=Markup("\n".join(cards.rules)),
        provenance=provenance,
        settings=settings,
        suite=suite,
        script=Markup(SCRIPT.read_text()),
    )
    return page


def all_answers(cards: Cards, arms: Iterable[str], metrics: Metrics) -> list[Markup]:
    """A card for every question, in order; where they would be larger than LARGEST, for some drawn at random."""
    order, shown = list(range(metrics.n)), {}
    random.Random(metrics.seed).shuffle(order)
    for place in order:
        card = cards.card(place, arms)
        if cards.size > LARGEST:
            break
        shown[place] = card
    return [card for _, card in sorted(shown.items())]


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
    for kind in MemoryKind:
        text = text.replace(f"&lt;m_I^{kind[0]}&gt;", f' <span class="chip {kind}">{kind}-term memory</span> ')
    return Markup(re.sub(r"\s{2,}", " ", text).strip())


def signed(value: float) -> str:
    """With its sign, a true minus: as wide as a plus."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _memory(answer: Prediction) -> str:
    """The kinds of memory that an answer invoked, as one letter for the page's filter: s, l, b(oth) or n(one)."""
    kinds = {event.kind for event in answer.invocations}
    return "b" if len(kinds) > 1 else next(iter(kinds), "none")[0]
