"""The executor in torch: prefills prompts, draws tokens, appends them and forms memories, on the CPU or a GPU."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from vismem.data.sample import Sample
from vismem.generation.context import Context
from vismem.generation.decode_state import DecodeState
from vismem.generation.invocation import BASE_MODES
from vismem.generation.loop import Asked, Prefilled, Request, greedy_columns
from vismem.generation.prompts import encode, inputs_of
from vismem.generation.slots import room
from vismem.generation.token_scores import together
from vismem.models.backbones.base import Inputs, Prompt, following
from vismem.models.kinds import MemoryKind
from vismem.models.tensor_parallel import agreed
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.runtime.cache import ContentCache
from vismem.runtime.chat import Chat
from vismem.runtime.images import decoded, hash_of
from vismem.runtime.limits import check_patches, check_positions, check_tokens
from vismem.runtime.reserved import Reserved


@dataclass(frozen=True)
class Prepared:
    """A question from outside, encoded."""

    inputs: Inputs
    seen: bytes  # the images' hash
    id: str = ""  # random numbers are drawn by it


@dataclass(eq=False)
class _Source:
    """Where the memories of a request's rows come from: their own prompts, or other samples' (`donors`)."""

    context: Context
    prompt: Prompt  # before the policy appends to it
    adapted: bool  # the policy's adapter is on, if the model has one
    donors: Sequence[int] | None  # for each sample, the one whose memory its answers are given
    best_words: bool  # see InvocationPolicy
    donated: dict[MemoryKind, Tensor] = field(default_factory=dict)


class TorchExecutor:
    """See `loop.Executor`. Its methods are called in inference mode."""

    running = torch.inference_mode
    modes = BASE_MODES

    def __init__(self, model: VisMemModel, max_patches: int | None = None, cache_bytes: int = 0) -> None:
        """See `OnnxExecutor`."""
        self.model, self.backbone, self.max_patches = model, model.backbone, max_patches
        self.cache = ContentCache(cache_bytes)
        self.kinds = {token: kind for kind, token in model.invoke_ids.items()}
        self.ends, self.limit, self.new_tokens = model.end_ids, model.limit, model.new_tokens
        self.delimiters, self.stops = frozenset(model.delimiter_ids), frozenset(model.stop_ids)
        self.anywhere = model.invocation_config.anywhere
        self.encoding = threading.Lock()  # of the processor's tokenizer, which changes while it encodes
        self.state = DecodeState(model)
        self.sources: list[_Source] = []  # of each row

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """One that several threads may decode with."""
        return Tokenizer.from_str(self.backbone.processor.tokenizer.backend_tokenizer.to_str())

    def prepare(self, images: Sequence[Image.Image], chat: Chat, max_new_tokens: int) -> Prepared:
        """A conversation for `join`, encoded. RequestError for an unusable one."""
        Reserved(self.tokenizer).check(chat)
        check_patches(sum(self.backbone.patch_counts([image.size for image in images])), self.max_patches)
        pictures: Any = tuple(decoded(images))
        with self.encoding:
            inputs = inputs_of(self.backbone, [Sample("", pictures, question="", answer="", chat=tuple(chat))])
        check_tokens(int(inputs.mask.sum()), self.max_patches)
        check_length(self.model, inputs, max_new_tokens)
        return Prepared(inputs, hash_of(pictures))

    def read(self, sample: Prepared, memory: bool) -> None:
        """Nothing: adapters are switches of the whole model, so no other thread runs it."""

    def join(self, request: Request, limit: int) -> list[Prefilled]:
        policy, samples = request.policy, request.samples
        with self.model.policy_lora.rows([not policy.base]):
            if isinstance(samples[0], Prepared):  # it comes alone
                context = self._read(samples[0], policy.base)
                prompt = opened = context.prompt
            else:
                prompt = request.prompt or encode(self.backbone, samples, policy.whole)
                opened = policy.opened(prompt, self.backbone, samples)
                context = self.state.prefill(opened)
        own = _room(self.model, request.max_new_tokens, limit)
        self.state.join(context, request.group_size, own, remember=limit > 0)
        context.looks = request.looks
        source = _Source(context, prompt, not policy.base, policy.donors(samples), policy.best_words)
        self.sources += [source] * (len(samples) * request.group_size)
        lengths, before, visual = (each.sum(1).tolist() for each in (opened.mask, prompt.mask, opened.visual))
        return [Prefilled(n, seen, n - own) for n, seen, own in zip(lengths, visual, before, strict=True)]

    def _read(self, sample: Prepared, base: bool) -> Context:
        """Without what memories read of it: that grows, so it is kept with the answer's row alone."""

        def prefill() -> Context:
            seen = self.cache.get(("seen", base, sample.seen), lambda: self.backbone.features(sample.inputs), _bytes)
            return self.state.prefill(self.backbone.placed(sample.inputs, seen))

        key = "read", base, sample.seen, tuple(sample.inputs.ids[0].tolist())
        return replace(self.cache.get(key, prefill, _bytes))

    def choose(self, asked: Asked) -> tuple[list[int], list[float]]:
        tokens, logprobs, size = list[int](), list[float](), together(self.model.vocabulary)
        for start in range(0, len(asked.forced), size):
            rows = slice(start, start + size)
            part = Asked(**{name: values[rows] for name, values in vars(asked).items()})
            found = self._choose(self.state.last[rows], part, [source.best_words for source in self.sources[rows]])
            tokens, logprobs = tokens + found[0], logprobs + found[1]
        return tokens, logprobs

    def _choose(self, last: Tensor, asked: Asked, best_words: list[bool]) -> tuple[list[int], list[float]]:
        """The same for rows whose next token follows the hidden states `last` (R, d)."""
        logits, vocabulary, invokes = self.model.logits(last), self.model.vocabulary, tuple(self.kinds)
        logits[:, vocabulary:].masked_fill_(torch.from_numpy(asked.barred).to(logits.device), -torch.inf)
        if not (sampled := asked.temperature > 0).any():
            logprobs = logits.log_softmax(-1)
            columns = self._greedy(logprobs, asked)
        else:
            temperature = torch.from_numpy(asked.temperature).to(logits)
            logprobs = (logits / temperature.where(temperature > 0, 1.0)[:, None]).log_softmax(-1)
            columns = self._drawn(logprobs, asked)
            if not sampled.all():
                columns = columns.where(temperature > 0, self._greedy(logprobs, asked))
            if any(best_words):
                logprobs, columns = _likeliest(logprobs, columns, torch.tensor(best_words, device=logprobs.device))
        settled = asked.settled(agreed(columns, self.backbone.processes).tolist(), vocabulary)
        chosen = logprobs.gather(1, torch.tensor(settled, device=logits.device)[:, None])[:, 0]
        tokens = [column if column < vocabulary else invokes[column - vocabulary] for column in settled]
        return tokens, chosen.tolist()

    def _greedy(self, logprobs: Tensor, asked: Asked) -> Tensor:
        """(R,) the best column; the best word in a row that declines invoke tokens."""
        columns: Tensor = greedy_columns(logprobs)
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
        columns = _column_at(cumulative, drawn).masked_fill(total.isnan(), 0)  # a word, as greedily: no memory
        if not asked.declines.any():
            return columns
        declined = torch.from_numpy(asked.declines).to(columns.device) & (columns >= vocabulary)
        again = (drawn - words) / (total - words) * words
        return _column_at(cumulative[:, :vocabulary], again).where(declined, columns)

    def append(self, tokens: Sequence[int]) -> None:
        ids = torch.tensor(tokens, device=self.backbone.device)
        embed = self.model.embed if self.kinds.keys() & tokens else self.backbone.embedding
        with self.model.policy_lora.rows([source.adapted for source in self.sources]):
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
            state.join(context := state.prefill(source.prompt), group_size=1, room=1, remember=True)
            state.append(self.model.embed(torch.full((count, 1), self.model.invoke_ids[kind], device=device)))
            source.donated[kind] = state.form(kind, context, range(count))
        return source.donated[kind]

    def insert(self, kind: MemoryKind, rows: Sequence[int], memory: Tensor) -> None:
        with self.model.policy_lora.rows([self.sources[row].adapted for row in rows]):
            self.state.insert(memory, self.ends[kind], rows)

    def keep(self, rows: Sequence[int]) -> None:
        self.sources = [self.sources[row] for row in rows]
        if rows:
            self.state.keep(rows)
        else:  # nothing stays allocated
            self.state = DecodeState(self.model)


def check_length(model: VisMemModel, read: Inputs | Prompt, max_new_tokens: int) -> None:
    """RequestError where the longest of the prompts, with its answer, needs more positions than the base has."""
    held = int(model.backbone.model.config.text_config.max_position_embeddings)
    longest = int(following(read.positions, read.mask).max())
    check_positions(longest + _room(model, max_new_tokens, model.limit(None)), held)


def _room(model: VisMemModel, max_new_tokens: int, memories: int) -> int:
    return room(max_new_tokens, memories, max(map(model.length_of, KINDS)))


def _bytes(read: Context | Tensor | None) -> int:
    if isinstance(read, Context):
        prompt = read.prompt
        held = [prompt.embeds, prompt.vision.patches, read.visual, *read.cache.keys, *read.cache.values]
        return sum(tensor.nbytes for tensor in held)
    return 0 if read is None else read.nbytes


def _column_at(cumulative: Tensor, at: Tensor) -> Tensor:
    """(R,) the first column whose cumulative probability (R, columns) exceeds `at` (R,)."""
    found = torch.searchsorted(cumulative.contiguous(), at[:, None], right=True)[:, 0]
    return found.clamp_max(cumulative.shape[1] - 1)


def _likeliest(logprobs: Tensor, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R, V + 2) and columns (R,), with the likeliest word for any in some rows, (R,) of booleans.

    Each word there has the log-probability of all: processes of one model may find another the likeliest.
    """
    words = logprobs[:, :-2]
    whole = torch.cat([words.logsumexp(-1, keepdim=True).expand_as(words), logprobs[:, -2:]], dim=1)
    taken = torch.where(columns < words.shape[1], words.argmax(-1), columns)
    return whole.where(rows[:, None], logprobs), taken.where(rows, columns)
