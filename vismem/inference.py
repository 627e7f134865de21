"""Ask a trained model about images, in Python: load it by name, answer, stream, save, push to the hub.

from vismem import VisMem

model = VisMem.from_pretrained("models:/vismem@champion")
print(model.answer("photo.png", "how many cups?").marked)
"""

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from vismem.data.sample import Sample
from vismem.errors import UserError, first_line
from vismem.files import read_json
from vismem.generation.engine import generate, stream
from vismem.generation.invocation import MODES, InvocationPolicy, mode_of
from vismem.generation.prompts import encode
from vismem.generation.torch_executor import check_length
from vismem.generation.types import LATENT, Rollout
from vismem.hub import push, read_card, write_card, write_code
from vismem.models.backbones.base import Prompt
from vismem.models.reference import WEIGHTS, Base
from vismem.models.vismem import VisMemModel
from vismem.provenance import sha256_folder, write_manifest
from vismem.runtime.chat import Chat, check_chat, one_turn, said
from vismem.runtime.images import size_after_resizing, upright
from vismem.runtime.limits import NEW_TOKENS, RequestError, check_request
from vismem.runtime.prompt import TextStream
from vismem.runtime.reserved import Reserved
from vismem.scope import Scope
from vismem.serving.exchange import Answer, AnyImage, Images, Token, check_seed, encoded
from vismem.sources import ADDED, find_added, find_base

Memory = bool | Literal["learned", "off", "short", "long"]

logger = logging.getLogger(__name__)


class VisMem:
    """A vision-language model with latent vision memory, ready to answer."""

    def __init__(
        self, model: VisMemModel, base: Base, place: str | Path, card: Mapping[str, bytes] | None = None
    ) -> None:
        """`base` is how the model refers to its base, `place` where that was loaded from.

        `card`: the model card and its pictures, by file name.
        """
        self.model, self.base, self.place, self.card = model, base, place, card or {}
        self.scope = Scope.read(Path(place))

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        base: str | Path | None = None,
    ) -> "VisMem":
        """Load a model by its name.

        `name`: a folder (a bundle, what stage1 or stage2 wrote beside its base, or "assets/tiny-vlm-memory", which
        comes with VisMem), a hub id, or "models:/NAME@ALIAS" or "models:/NAME/VERSION" of the MLflow registry.
        `device`: the first GPU where there is one, else the CPU. `dtype`: of the base's weights; that of the base when
        the model was saved, or float32. `base`: hub id or folder, where it is not as the model says.
        UserError for what is missing or damaged, for a base that does not fit, and for a device that is not here.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)  # before a large model is loaded
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"the device '{device}' cannot be used: {first_line(error)}") from None
        added = find_added(name)
        reference, place = find_base(added, base)
        model = VisMemModel.from_pretrained(added, place, dtype or _saved_dtype(added))
        model.backbone.model.to(device)
        model.to(device)
        return cls(model, reference, place, read_card(added))

    # --- answers ---

    def answer(
        self,
        images: Images,
        question: str | Chat,
        *,
        memory: Memory = True,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer:
        """Answer one question about one or more images (paths, PIL images, or encoded files as bytes).

        `question`: a text, in which images stand at its marks `<image>` where it has one for each, else before it; or
        a conversation (see `read_messages`).

        `memory`: True or "learned", the model may invoke both kinds; "short" or "long", one; False or "off", none.
        `max_new_tokens`: by default as in the model's evaluation or, before `export`, its training, 120 where it does
        not say. `temperature` 0 is greedy. UserError for an image that cannot be read, a question that holds one of
        the model's own tokens (`<m_I^s>`, `<|im_end|>`), a setting that cannot be, and a request over the limits or
        the base's length.
        """
        (answer,) = self.answers(
            [(images, question)], memory=memory, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return answer

    def answers(
        self,
        questions: Iterable[tuple[Images, str | Chat]],
        *,
        memory: Memory = True,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[Answer]:
        """Answer (images, question) pairs, `batch_size` together; see `answer`. In float32 each is as it is alone."""
        longest = self._longest(max_new_tokens)
        samples = [self.sample(images, question, longest) for images, question in questions]
        drawn = _drawn(longest, temperature, seed)
        answers = []
        for at in range(0, len(samples), batch_size):
            started, batch = time.perf_counter(), samples[at : at + batch_size]
            prompt = self._prompt(batch, longest)
            rollouts = generate(self.model, batch, policy_of(memory), prompt=prompt, **drawn)
            seconds, read = time.perf_counter() - started, prompt.mask.sum(1).tolist()
            answers += [
                Answer.of(self._pieces(rollout), _usage(rollout, tokens), seconds)
                for rollout, tokens in zip(rollouts, read, strict=True)
            ]
        return answers

    def stream(
        self,
        images: Images,
        question: str | Chat,
        *,
        memory: Memory = True,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[Token]:
        """Yield the pieces of the answer that `answer` gives, when they are decoded; see `vismem.serving.exchange`."""
        longest = self._longest(max_new_tokens)
        sample = self.sample(images, question, longest)
        policy, drawn = policy_of(memory), _drawn(longest, temperature, seed)
        return self._text(stream(self.model, sample, policy, prompt=self._prompt([sample], longest), **drawn))

    # --- files ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what VisMem adds, its card and its manifest, for `from_pretrained` on any machine.

        The base is referred to, or copied into `folder`/base where only this machine has it.
        """
        folder, base = Path(folder), self.base
        self.model.save_pretrained(folder)
        if not base.everywhere:
            copy = folder / "base"
            if not (copy.is_dir() and copy.samefile(self.place)):  # else the model came from this folder
                shutil.copytree(self.place, copy, dirs_exist_ok=True)
            base = Base("base", sha256_folder(copy, WEIGHTS))
        base.write(folder)
        write_card(folder, self.card, base.model)
        write_code(folder)
        write_manifest(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, made if need be; returns its URL."""
        return push(self.save_pretrained, repo_id, private, token)

    # --- one request ---

    def _longest(self, asked: int | None) -> int:
        return self.model.new_tokens if asked is None else asked

    def sample(self, images: Images, question: str | Chat, max_new_tokens: int = NEW_TOKENS) -> Sample:
        """The request as the engine takes it, checked. What the base cannot read is logged, which stderr shows."""
        several = [images] if isinstance(images, AnyImage) else list(images)
        names = [
            str(image) if isinstance(image, str | Path) else f"image {number} of {len(several)}"
            for number, image in enumerate(several, 1)
        ]
        files = [image if isinstance(image, Image.Image) else encoded(image) for image in several]
        try:
            chat = one_turn(question, len(files)) if isinstance(question, str) else question
            opened = check_request(files, said(chat).encode(errors="surrogatepass"), max_new_tokens, names)
            check_chat(chat, len(files))
            Reserved(self.model.backbone.processor.tokenizer.backend_tokenizer).check(chat)
            self.model.backbone.patch_counts([image.size for image in opened])  # refuses one that makes none
            if self.scope:
                processor = self.model.backbone.processor.image_processor
                sizes = [size_after_resizing(image.size, processor) for image in opened]
                for doubt in self.scope.doubts(opened, sizes, said(chat)):
                    logger.warning(doubt)
        except RequestError as error:
            raise UserError(str(error)) from None
        seen: Any = tuple(upright(file) if isinstance(file, Image.Image) else file for file in files)
        # Random numbers are drawn by the id: as the server does.
        return Sample("", seen, question="", answer="", chat=tuple(chat))

    @torch.inference_mode()
    def _prompt(self, samples: Sequence[Sample], max_new_tokens: int) -> Prompt:
        """The prompts, encoded. UserError where one is too long for the base."""
        prompt = encode(self.model.backbone, samples)
        try:
            check_length(self.model, prompt, max_new_tokens)
        except RequestError as error:
            raise UserError(str(error)) from None
        return prompt

    def _pieces(self, rollout: Rollout) -> list[Token]:
        hidden = {LATENT, *self.model.end_ids.values()}
        return list(self._text(token for token in rollout.token_ids if token not in hidden))

    def _text(self, ids: Iterable[int]) -> Iterator[Token]:
        """The pieces of text that words and invokes make; an "end" comes last."""
        text = TextStream(self.model.backbone.processor.tokenizer.backend_tokenizer)
        kinds = {token: kind for kind, token in self.model.invoke_ids.items()}
        for token in ids:
            if token in kinds:
                yield Token("", kinds[token].value)
            elif piece := text.add(token):
                yield Token(piece, "token")
        if rest := text.finish():
            yield Token(rest, "token")
        yield Token("", "end")


def _saved_dtype(added: Path) -> str:
    """The type of the base's weights when the model was saved; float32 where it does not say, as older ones."""
    settings = read_json(added / ADDED)
    return "bfloat16" if isinstance(settings, dict) and settings.get("dtype") == "bfloat16" else "float32"


def _drawn(max_new_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
    """What tokens are drawn by. UserError for a seed or a temperature that cannot be."""
    check_seed(seed)
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: it is 0, which is greedy, or more")
    return {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}


def _usage(rollout: Rollout, prompt_tokens: int) -> dict[str, Any]:
    """What an answer took, as a server says it (`pieces.Usage`)."""
    memories = Counter(invocation.kind.value for invocation in rollout.invocations)
    finish = "stop" if rollout.finished else "length"
    tokens = {"prompt_tokens": prompt_tokens, "tokens": rollout.answer_length}
    return {"finish": finish, **tokens, "memories": dict(memories)}


def policy_of(memory: Memory) -> InvocationPolicy:
    """When memory is invoked. UserError for a kind that there is not."""
    mode = mode_of(memory)
    if mode not in MODES:
        raise UserError(f"memory={memory!r}: it is {', '.join(MODES)}, True (learned) or False (off)")
    return MODES[mode]
