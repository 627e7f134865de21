"""`report.html`: one self-contained page that reads offline, from metrics, predictions and charts."""

import hashlib
import io
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from markupsafe import Markup, escape
from PIL import Image

from vismem.config import EvaluateConfig
from vismem.data.answer_forms import normalise
from vismem.evaluation.answers import UNPARSED
from vismem.evaluation.arms import label, resolve_arms
from vismem.evaluation.benchmarks import task_names
from vismem.evaluation.looks import map_picture
from vismem.evaluation.metrics import cluster_of, is_yes_no
from vismem.evaluation.panels import Panel, to_svg
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.scored import MARK, Scored
from vismem.evaluation.summary import headline
from vismem.models.attention import Look
from vismem.models.kinds import MemoryKind
from vismem.pages import TIPS, page_environment, storable, thumbnail
from vismem.records import OVERALL, VANILLA, VISMEM, Metrics, p_value
from vismem.runtime.images import decoded_base64, upright

EXAMPLES = 4  # at most, of wins and of losses
LOOKED_AT = 60  # questions at most for which the page shows where memories looked
LARGEST = 4_000_000  # bytes of answers and their pictures in the page; of more, as many as fit are drawn at random
SCRIPT = Path(__file__).with_name("report.js")

Pictures = Callable[[str], Sequence[bytes] | None]  # a sample's, by its id


class Cards:
    """Answered questions as HTML. A picture that several questions share is embedded once, as a class of the style."""

    def __init__(
        self,
        answers: Mapping[str, Sequence[Prediction | Scored]],
        tasks: Sequence[str],
        pictures: Pictures = lambda _: None,
        looks: Mapping[int, Sequence[Look]] = MappingProxyType({}),
    ) -> None:
        """`answers`: by arm; `tasks`: of the questions; `looks`: of VisMem's memories, by place."""
        self.environment = page_environment("vismem.evaluation")  # of the page that they are in
        self.environment.filters |= {f.__name__: f for f in (label, mark_memories, p_value, signed)}
        self.rules: list[str] = []  # of the style sheet, one per picture
        self.size = 0  # bytes of all cards and rules so far
        self._macro = self.environment.get_template("card.html.j2").module.card  # type: ignore[attr-defined]
        self._answers, self._tasks, self._pictures, self._looks = answers, tasks, pictures, looks
        self._classes: dict[bytes, str] = {}  # by the picture's sha256

    def card(self, place: int, arms: Iterable[str]) -> Markup:
        """The question at `place` as `arms` answered it; its pictures are in `rules` from now on."""
        answers = {arm: self._answers[arm][place] for arm in arms}
        asked = next(iter(answers.values()))
        classes = [self._class(data) for data in self._pictures(asked.id) or ()]
        verdicts = [_verdict(answer) for answer in answers.values()]
        memories = [_letter(answer.memories) for answer in answers.values()]
        looks = {VISMEM: self._looks.get(place, ())}
        card = Markup(self._macro(asked, self._tasks[place], answers, classes, verdicts, memories, looks))
        self.size += len(card.encode(errors="replace"))
        return card

    def every(self, seed: int, first: Collection[int] = ()) -> list[Markup]:
        """A card for every question, in order behind the `first`; where they would be larger than LARGEST, for some."""
        shown: dict[int, Markup] = {}
        count = len(self._tasks)
        for place in dict.fromkeys([*first, *random.Random(seed).sample(range(count), count)]):
            card = self.card(place, self._answers)
            if self.size > LARGEST:
                break
            shown[place] = card
        return [shown[place] for place in sorted(shown, key=lambda place: (place not in first, place))]

    def _class(self, data: bytes) -> str:
        """The picture's class; of one that does not decode, none."""
        if (key := hashlib.sha256(data).digest()) not in self._classes:
            address = thumbnail(data)
            self._classes[key] = f"p{len(self._classes)}" if address else ""
            if address:
                width, height = upright(Image.open(io.BytesIO(decoded_base64(address)))).size
                size = f"{100 * min(1, width / height):.0f}% {100 * min(1, height / width):.0f}%"
                self.rules.append(f".{self._classes[key]}{{background-image:url({address});--size:{size}}}")
                self.size += len(self.rules[-1])
        return self._classes[key]


def render(
    metrics: Metrics,
    predictions: Mapping[str, Sequence[Prediction]],
    charts: Mapping[str, Sequence[Panel]],
    pictures: Pictures,
    provenance: Mapping[str, str],
    settings: EvaluateConfig,
    looks: Mapping[int, Sequence[Look]] = MappingProxyType({}),
    suite: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page. `charts`: panels by name; `pictures`: of a sample, by its id; `looks`: by place, see `find_looks`;
    `suite`: rows of `suite.json`.

    Everything that came from data is escaped; pictures are embedded, as thumbnails.
    """
    vanilla = predictions[VANILLA]
    tasks = task_names(vanilla)
    cards = Cards(predictions, tasks, pictures, looks)
    clusters = {(task, cluster_of(answer)) for task, answer in zip(tasks, vanilla, strict=True)}
    wins, losses = disagreements(predictions)
    shown_wins, shown_losses = (
        [cards.card(place, (VISMEM, VANILLA)) for place in places] for places in examples(wins, losses, metrics.seed)
    )
    answers = cards.every(metrics.seed, looks)
    references = [normalise(answer.reference) for answer in vanilla if is_yes_no(answer)]
    page: str = cards.environment.get_template("report.html.j2").render(
        metrics=metrics,
        headline=headline(metrics),
        groups=[OVERALL, *metrics.counts],
        fewest=min(Counter(task for task, _ in clusters).values()),
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
        looked_at=len(looks),
        picture_style=Markup("\n".join(cards.rules)),
        provenance=provenance,
        settings=settings,
        suite=suite,
        script=Markup(TIPS + SCRIPT.read_text()),
    )
    return storable(page)


def to_look_at(predictions: Mapping[str, Sequence[Prediction]], seed: int) -> list[int]:
    """Places of questions whose memories' looks the page should show: the examples', then some drawn at random."""
    wins, losses = examples(*disagreements(predictions), seed)
    answers = predictions.get(VISMEM, ())
    order = dict.fromkeys([*wins, *losses, *random.Random(seed).sample(range(len(answers)), len(answers))])
    return [place for place in order if answers[place].invocations][:LOOKED_AT]


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


def mark_memories(marked_text: str, looks: Sequence[Look] = ()) -> Markup:
    """The answer as HTML, each invocation a coloured chip, everything else escaped; a chip with a look shows it."""
    parts = re.split(str(escape(MARK.pattern)), str(escape(marked_text)))
    kinds = [next(kind for kind in MemoryKind if kind[0] == letter) for letter in parts[1::2]]
    known: Sequence[Look | None] = looks if len(looks) == len(kinds) else [None] * len(kinds)
    chips = [_chip(kind, look) for kind, look in zip(kinds, known, strict=True)]
    text = parts[0] + "".join(f" {chip} {said}" for chip, said in zip(chips, parts[2::2], strict=True))
    return Markup(re.sub(r"\s{2,}", " ", text).strip())


def signed(value: float) -> str:
    """With its sign, a true minus: as wide as a plus."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _chip(kind: MemoryKind, look: Look | None) -> str:
    if look is None:
        return f'<span class="chip {kind}">{kind}-term memory</span>'
    maps = " ".join(f"url({map_picture(grid, kind)})" if grid else "none" for grid in look.maps)
    said = f"{100 * look.share:.0f} % of this memory's attention was on the pictures"
    data = f'data-tip="{said}" data-maps="{maps}"'
    return f'<button type="button" class="chip {kind}" {data}>{kind}-term memory</button>'


def _verdict(answer: Prediction | Scored) -> str:
    """For the page's filter, as one letter: 1 right, u unparsed, 0 wrong otherwise."""
    return "1" if answer.score == 1 else "u" if answer.rule == UNPARSED else "0"


def _letter(kinds: Iterable[str]) -> str:
    """The kinds of memory that an answer invoked, as one letter for the page's filter: s, l, b(oth) or n(one)."""
    letters = {kind[0] for kind in kinds}
    return "b" if len(letters) > 1 else next(iter(letters), "n")
