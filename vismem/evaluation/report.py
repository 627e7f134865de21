"""`report.html`: one self-contained page that reads offline, from metrics, predictions and plots."""

import base64
import random
import re
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from vismem.config import EvaluateConfig
from vismem.evaluation.answers import normalise
from vismem.evaluation.arms import ARMS, label
from vismem.evaluation.metrics import is_yes_no
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.summary import headline, p_value
from vismem.models.kinds import MemoryKind
from vismem.records import OVERALL, VANILLA, VISMEM, Metrics

EXAMPLES = 4  # at most, of wins and of losses


def render(
    metrics: Metrics,
    predictions: Mapping[str, Sequence[Prediction]],
    plots: Mapping[str, bytes],
    pictures: Mapping[str, Sequence[bytes]],
    provenance: Mapping[str, str],
    settings: EvaluateConfig,
) -> str:
    """The page. `plots`: PNGs by name; `pictures`: a sample's id to its images, at least those of `examples`.

    Everything that came from data is escaped; images are embedded.
    """
    loader = PackageLoader("vismem.evaluation", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)  # a missing figure is a fault
    environment.filters |= {f.__name__: f for f in (data_uri, label, mark_memories, p_value, signed)}
    wins, losses = disagreements(predictions)
    shown_wins, shown_losses = examples(wins, losses, metrics.seed)
    references = [normalise(answer.reference) for answer in predictions[VANILLA] if is_yes_no(answer)]
    page: str = environment.get_template("report.html.j2").render(
        metrics=metrics,
        headline=headline(metrics),
        groups=[OVERALL, *metrics.counts],
        yes_is_right=100 * references.count("yes") / max(len(references), 1),
        arms=[ARMS[arm] for arm in metrics.arms],
        differences=({VISMEM: metrics.gain} if metrics.gain else {}) | metrics.ablations,
        plots=plots,
        pictures=pictures,
        wins=[{arm: predictions[arm][place] for arm in (VISMEM, VANILLA)} for place in shown_wins],
        losses=[{arm: predictions[arm][place] for arm in (VISMEM, VANILLA)} for place in shown_losses],
        win_count=len(wins),
        loss_count=len(losses),
        provenance=provenance,
        settings=settings,
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
    for kind in MemoryKind:
        text = text.replace(f"&lt;m_I^{kind[0]}&gt;", f' <span class="chip {kind}">{kind}-term memory</span> ')
    return Markup(re.sub(r"\s{2,}", " ", text).strip())


def data_uri(image: bytes) -> str:
    """A PNG or JPEG as an address that holds the image itself."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def signed(value: float) -> str:
    """With its sign, a true minus: as wide as a plus."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
