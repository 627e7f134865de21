"""What the tiny VLM answers without memory: from coarse prompts, and where it also sees the whole images."""

from collections import defaultdict
from collections.abc import Sequence

from recipes.tiny_vlm.scenes import SIDE, of_size
from vismem.config import InvocationConfig, MemoryConfig, ScenesSource
from vismem.data.sample import Sample
from vismem.data.scenes import generate
from vismem.data.tasks import NEEDS
from vismem.evaluation.answers import score as grade
from vismem.generation.controls import FullResolution, Relook
from vismem.generation.engine import generate as decode
from vismem.generation.invocation import Off
from vismem.models.backbones.base import Backbone
from vismem.models.vismem import VisMemModel

FRESH = 1_000_000  # a seed whose questions no training has seen
WAYS = {"coarse": Off(), "coarse, then whole": Relook(), "whole": FullResolution()}
BATCH = 64
MAX_NEW_TOKENS = 120

Scores = dict[str, dict[str, float]]  # percent right by way of looking and need, and "all"


def score(backbone: Backbone, prompt_pixels: int, count: int, sides: Sequence[int]) -> dict[str, float]:
    """Percent of right answers from coarse prompts by pixels a side, on `count` fresh pretrain questions each."""
    off = {"coarse": WAYS["coarse"]}
    return {
        f"{side} x {side}": accuracy(backbone, prompt_pixels, of_size(count, FRESH, side), off)["coarse"]["all"]
        for side in sides
    }


def score_split(backbone: Backbone, prompt_pixels: int, split: str, count: int) -> Scores:
    """On fresh pretrain questions, or those of the validation split: more objects, other wordings."""
    source = ScenesSource(image_size=SIDE, tasks=())
    return accuracy(backbone, prompt_pixels, list(generate(source, split, FRESH, count)), WAYS)


def score_coarse(backbone: Backbone, prompt_pixels: int, count: int) -> dict[str, float]:
    """On fresh questions of the validation split, from coarse prompts alone: percent by need, and of "all"."""
    samples = list(generate(ScenesSource(image_size=SIDE, tasks=()), "validation", FRESH, count))
    found = accuracy(backbone, prompt_pixels, samples, {"coarse": WAYS["coarse"]})["coarse"]
    return {group: found[group] for group in ("all", *dict.fromkeys(NEEDS.values()))}


def accuracy(backbone: Backbone, prompt_pixels: int, samples: Sequence[Sample], ways: dict[str, Off]) -> Scores:
    """Percent of greedy answers that are right."""
    model = VisMemModel(backbone, MemoryConfig(prompt_pixels=prompt_pixels), InvocationConfig())
    scores: Scores = {}
    for way, policy in ways.items():
        right = defaultdict[str, list[float]](list)
        for sample, found in zip(samples, answered_right(model, samples, policy), strict=True):
            for group in ("all", NEEDS[sample.task], sample.task):
                right[group].append(found)
        scores[way] = {group: round(100 * sum(each) / len(each), 2) for group, each in right.items()}
    return scores


def answered_right(model: VisMemModel, samples: Sequence[Sample], policy: Off) -> list[float]:
    """The scores of the greedy answers, 1 for one that is right."""
    scores: list[float] = []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        answers = decode(model, batch, policy, max_new_tokens=MAX_NEW_TOKENS)
        scores += [grade(sample, answer.text) for sample, answer in zip(batch, answers, strict=True)]
    return scores
