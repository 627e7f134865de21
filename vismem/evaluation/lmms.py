"""The model `vismem` of lmms-eval: its generation tasks score any arm of `evaluate`, decoded by our own engine.

lmms-eval finds it by the entry point group `lmms_eval.models`; nothing of ours imports this module.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import groupby, islice
from typing import Any, Literal

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from vismem.data.sample import Sample
from vismem.errors import UserError, nearest
from vismem.evaluation.arms import ARMS, find_arm
from vismem.generation.engine import generate
from vismem.inference import VisMem
from vismem.progress import progress
from vismem.records import VISMEM
from vismem.runtime.chat import IMAGE, Turn, joined

DELIMITER = "\n\n"  # lmms-eval's own `until` where a task names none: it would cut answers of several paragraphs
MANIFEST = ModelManifest(model_id="vismem", chat_class_path="vismem.evaluation.lmms.VisMemLmms")


class VisMemLmms(lmms):  # type: ignore[misc]  # its package has no types
    """`--model vismem --model_args pretrained=MODEL,arm=ARM`."""

    is_simple = False  # it takes conversations

    def __init__(
        self,
        pretrained: str,
        arm: str = VISMEM,
        base: str | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """`pretrained`, `base`, `device`, `dtype`: see `VisMem.from_pretrained`. `arm`: an arm of the trained model.

        `max_new_tokens` where a task does not say; None: see `VisMem.answer`. Of several processes each has the GPU of
        its rank.
        """
        super().__init__()
        known = [name for name, own in ARMS.items() if own.model == VISMEM]
        found = find_arm(arm)
        if found is None or found.model != VISMEM:
            raise UserError(f"arm={arm}: the trained model has {', '.join(known)}{nearest(arm, known)}")
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.arm, self.seed = found, int(seed)
        self.rows = int(batch_size) if str(batch_size).isdigit() else 16  # "auto"
        self.asked = Counter[str]()  # how often each question was: repeats draw other numbers
        self.vismem = VisMem.from_pretrained(pretrained, device, dtype, base)
        self.longest = int(max_new_tokens or self.vismem.model.new_tokens)
        self.device = self.vismem.model.backbone.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers, in order. UserError for a question or a setting that the model has no use for."""
        answers = list[GenerationResult]()
        with progress(f"lmms-eval: {self.arm.label}", len(requests)) as advance:
            for (limit, temperature, until), group in groupby(requests, key=lambda request: _settings(request.args[2])):
                options: dict[str, Any] = {"max_new_tokens": limit or self.longest, "temperature": temperature}
                while asked := [*map(self._sample, islice(group, self.rows))]:
                    for rollout in generate(self.vismem.model, asked, self.arm.policy, seed=self.seed, **options):
                        text = reduce(lambda text, stop: text.partition(stop)[0], until, rollout.text)
                        answers.append(GenerationResult(text, TokenCounts(output_tokens=rollout.answer_length)))
                    advance(len(asked))
        return answers

    def _sample(self, request: Instance) -> Sample:
        """The question; random numbers are drawn by its id."""
        _, doc_to_messages, _, doc, task, split = request.args
        images, turns, name = list[Any](), list[Turn](), f"{task}-{doc}"
        for message in doc_to_messages(self.task_dict[task][split][doc]):
            parts = list[str | None]()
            for part in message["content"]:
                if part["type"] not in ("text", "image"):
                    raise UserError(f"{task}, document {doc}: {part['type']} is not supported, only text and images")
                parts.append(part["text"] if part["type"] == "text" else IMAGE)
                images += [part["url"]] if part["type"] == "image" else []
            turns.append(Turn(message["role"], joined(parts)))
        try:
            sample = self.vismem.sample(images, turns)
        except UserError as error:
            raise UserError(f"{task}, document {doc}: {error}") from None
        self.asked[name] += 1
        return replace(sample, id=name if self.asked[name] == 1 else f"{name} again {self.asked[name]}")

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        """Refused: which memories come is decided while an answer is decoded."""
        raise UserError("vismem scores no given answers: choose a task of `output_type: generate_until`")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Any:
        """Refused."""
        raise UserError("vismem takes no tasks of several rounds: choose one of `output_type: generate_until`")


def _settings(given: Mapping[str, Any]) -> tuple[int, float, tuple[str, ...]]:
    """Longest answer in tokens (0: not said), temperature and stop strings of a task's `generation_kwargs`."""
    temperature = float(given.get("temperature") or 0) if given.get("do_sample", True) else 0.0
    for name, value in {"num_beams": 1, "n": 1, **({"top_p": 1, "top_k": 0} if temperature else {})}.items():
        if (asked := given.get(name)) not in (None, value):
            raise UserError(f"generation_kwargs: {name}={asked} is not supported: give --gen_kwargs {name}={value}")
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else until
    return int(given.get("max_new_tokens") or 0), temperature, tuple(s for s in stops if s and s != DELIMITER)
