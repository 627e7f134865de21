"""The executor in torch: prefills prompts, draws tokens, appends them and forms memories, on the CPU or a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vismem.data.sample import Sample
from vismem.generation.context import Context
from vismem.generation.decode_state import DecodeState
from vismem.generation.invocation import NONE
from vismem.generation.loop import Asked, Prefilled, Request
from vismem.generation.prompts import encode
from vismem.generation.slots import room
from vismem.models.backbones.base import Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.runtime.images import decoded
from vismem.runtime.reserved import Reserved


@dataclass(eq=False)
class _Source:
    """Where the memories of a request's rows come from: their own prompts, or other samples' (`donors`)."""

    context: Context
    prompt: Prompt  # before the policy appends to it
    donors: Sequence[int] | None  # for each sample, the one whose memory its answers are given
    donated: dict[MemoryKind, Tensor] = field(default_factory=dict)


class TorchExecutor:
    """See `loop.Executor`. Its methods are called in inference mode."""

    running = torch.inference_mode

    def __init__(self, model: VisMemModel) -> None:
        self.model, self.backbone = model, model.backbone
        self.kinds = {token: kind for kind, token in model.invoke_ids.items()}
        self.ends, self.limit = model.end_ids, model.limit
        self.delimiters, self.stops = frozenset(model.delimiter_ids), frozenset(model.stop_ids)
        self.tokenizer = self.backbone.processor.tokenizer.backend_tokenizer
        self.state = DecodeState(model)
        self.sources: list[_Source] = []  # of each row

    def prepare(self, images: Sequence[Image.Image], question: str, max_new_tokens: int) -> Sample:
        """A question for `join`, its images decoded. RequestError for an unusable one."""
        Reserved(self.tokenizer).check(question)
        pictures: Any = tuple(decoded(images))
        return Sample("", pictures, question, answer="")  # random numbers are drawn by the id

    def read(self, sample: Sample, memory: bool) -> None:
        """Nothing: adapters are switches of the whole model, so no other thread runs it."""

    def join(self, request: Request, limit: int) -> list[Prefilled]:
        policy, samples = request.policy, request.samples
        prompt = request.prompt or encode(self.backbone, samples, policy.whole)
        opened = policy.opened(prompt, self.backbone, samples)
        slots = room(request.max_new_tokens, limit, max(map(self.model.length_of, KINDS)))
        context = self.state.join(opened, request.group_size, slots, remember=limit > 0)
        context.looks = request.looks
        self.sources += [_Source(context, prompt, policy.donors(samples))] * (len(samples) * request.group_size)
        lengths, before, visual = (each.sum(1).tolist() for each in (opened.mask, prompt.mask, opened.visual))
        return [Prefilled(n, seen, n - own) for n, seen, own in zip(lengths, visual, before, strict=True)]

    def choose(self, asked: Asked) -> tuple[list[int], list[float]]:
        logits, vocabulary = self.model.logits(self.state.last), self.model.vocabulary
        device = logits.device
        barred, forced = torch.from_numpy(asked.barred).to(device), torch.from_numpy(asked.forced).to(device)
        logits[:, vocabulary:].masked_fill_(barred, -torch.inf)
        temperature = torch.from_numpy(asked.temperature).to(device, logits.dtype)
        logprobs = (logits / temperature.where(temperature > 0, 1.0)[:, None]).log_softmax(-1)
        sampled = asked.temperature > 0
        columns = self._drawn(logprobs, asked) if sampled.any() else self._greedy(logprobs, asked)
        if sampled.any() and not sampled.all():
            columns = columns.where(temperature > 0, self._greedy(logprobs, asked))
        standing = torch.from_numpy(asked.standing).to(device)
        picked = standing.gather(1, (columns - vocabulary).clamp_min(0)[:, None])[:, 0]
        columns = columns.where(columns < vocabulary, vocabulary + picked)
        columns = columns.where(forced == NONE, vocabulary + forced)
        chosen = logprobs.gather(1, columns[:, None])[:, 0]
        return self.model.token_of(columns).tolist(), chosen.tolist()

    def _greedy(self, logprobs: Tensor, asked: Asked) -> Tensor:
        """(R,) the best column; the best word in a row that declines invoke tokens."""
        columns = logprobs.argmax(-1)
        if not asked.declines.any():
            return columns
        declines = torch.from_numpy(asked.declines).to(columns.device)
        return logprobs[:, : self.model.vocabulary].argmax(-1).where(declines, columns)

    def _drawn(self, logprobs: Tensor, asked: Asked) -> Tensor:
        """(R,) a column drawn by each row's uniform number, given the log-probabilities (R, V + 2).

        A row that declines invoke tokens draws a word with the same number, rescaled within the invoke tokens' share,
        in which it is uniform again.
        """
        vocabulary = self.model.vocabulary
        cumulative = logprobs.double().exp().cumsum(-1)
        total, words = cumulative[:, -1], cumulative[:, vocabulary - 1]
        drawn = torch.from_numpy(asked.uniform).to(total.device) * total
        columns = _column_at(cumulative, drawn)
        if not asked.declines.any():
            return columns
        declined = torch.from_numpy(asked.declines).to(columns.device) & (columns >= vocabulary)
        again = (drawn - words) / (total - words) * words
        return _column_at(cumulative[:, :vocabulary], again).where(declined, columns)

    def append(self, tokens: Sequence[int]) -> None:
        ids = torch.tensor(tokens, device=self.backbone.device)
        embed = self.model.embed if self.kinds.keys() & tokens else self.backbone.embedding
        self.state.append(embed(ids)[:, None])

    def form(self, kind: MemoryKind, rows: Sequence[int]) -> Tensor:
        parts = []
        for source, asking in groupby(rows, key=self.sources.__getitem__):  # a request's rows stand together
            own = list(asking)
            if source.donors is None:
                parts.append(self.state.form(kind, source.context, own))
            else:
                parts.append(self._donated(source, kind)[[source.donors[self.state.sample[row]] for row in own]])
        return torch.cat(parts)

    def _donated(self, source: _Source, kind: MemoryKind) -> Tensor:
        """(S, N, d): the memory that each sample forms at its own answer's start, decoded apart from the answers."""
        if kind not in source.donated:
            count, device = len(source.prompt.mask), self.backbone.device
            state = DecodeState(self.model)
            context = state.join(source.prompt, group_size=1, room=1, remember=True)
            state.append(self.model.embed(torch.full((count, 1), self.model.invoke_ids[kind], device=device)))
            source.donated[kind] = state.form(kind, context, range(count))
        return source.donated[kind]

    def insert(self, kind: MemoryKind, rows: Sequence[int], memory: Tensor) -> None:
        self.state.insert(memory, self.ends[kind], rows)

    def keep(self, rows: Sequence[int]) -> None:
        self.sources = [self.sources[row] for row in rows]
        if rows:
            self.state.keep(rows)
        else:  # nothing stays allocated
            self.state = DecodeState(self.model)


def _column_at(cumulative: Tensor, at: Tensor) -> Tensor:
    """(R,) the first column whose cumulative probability (R, columns) exceeds `at` (R,)."""
    found = torch.searchsorted(cumulative.contiguous(), at[:, None], right=True)[:, 0]
    return found.clamp_max(cumulative.shape[1] - 1)
