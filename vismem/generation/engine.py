"""The one rollout engine: batched decoding in which each row invokes memories independently (paper Sec. 3.2, Eq. 4).

Every row owns its slots in the cache. Rows that invoke a memory leave the others alone: their latents and end token
are inserted in one pass over those rows only, and then all rows are decoded together again.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vismem.data.sample import Sample
from vismem.generation.decode_state import DecodeState
from vismem.generation.invocation import NONE, InvocationPolicy, StepView, row_key, row_uniforms
from vismem.generation.prompts import encode
from vismem.generation.types import LATENT, Invocation, Rollout
from vismem.models.backbones.base import Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel


@torch.inference_mode()
def generate(
    model: VisMemModel,
    samples: Sequence[Sample],
    policy: InvocationPolicy,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    group_size: int = 1,
    prompt: Prompt | None = None,
) -> list[Rollout]:
    """Decode `group_size` answers per sample; rollouts come grouped by sample, in order.

    `temperature` 0 is greedy. Sampling depends on the seed, the sample's id and the member of the group, so an
    answer is the same whatever else is in the batch. In float32, that is: on a bfloat16 base it may change where the
    likeliest tokens are within 0.1 nats, since kernels add in another order for other shapes. `prompt`: the samples'
    prompts, where they are encoded already.
    """
    if not samples:
        return []
    decoder = _Decoder(model, samples, policy, max_new_tokens, temperature, seed, group_size, prompt)
    for _ in decoder.steps():
        pass
    return decoder.rollouts()


@torch.inference_mode()
def stream(
    model: VisMemModel,
    sample: Sample,
    policy: InvocationPolicy,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generator[int, None, Rollout]:
    """Yield the tokens of one answer, words and invokes, when they are decoded; returns what `generate` returns."""
    decoder = _Decoder(model, [sample], policy, max_new_tokens, temperature, seed, group_size=1)
    for tokens in decoder.steps():
        yield tokens[0]
    return decoder.rollouts()[0]


@dataclass
class _Row:
    """The record of one row's answer."""

    key: str
    uniform: NDArray[np.float64]  # for sampling, one number per decision
    tokens: list[tuple[int, bool, float]] = field(default_factory=list)  # id, in the loss or not, log-probability
    invocations: list[Invocation] = field(default_factory=list)
    decisions: int = 0
    answer_length: int = 0
    after_delimiter: bool = False
    remembering: bool = False  # a memory was inserted, and no word has followed it yet
    finished: bool = False

    def insert(self, ids: Sequence[int]) -> None:
        """Tokens that were not sampled."""
        self.tokens += [(token, False, 0.0) for token in ids]


@dataclass
class _Decoder:
    """One call of `generate`, whose parameters these are."""

    model: VisMemModel
    samples: Sequence[Sample]
    policy: InvocationPolicy
    max_new_tokens: int
    temperature: float
    seed: int
    group_size: int
    given: Prompt | None = None

    def __post_init__(self) -> None:
        """Prefill: the prompts, and what the policy appends to them."""
        model, policy, self.backbone = self.model, self.policy, self.model.backbone
        self.limit = min(model.limit(policy.limit), self.max_new_tokens)  # a word follows every memory
        keys = [row_key(sample.id, member) for sample in self.samples for member in range(self.group_size)]
        decisions = self.max_new_tokens + self.limit
        self.rows = [_Row(key, row_uniforms(self.seed, key, "sample", decisions)) for key in keys]
        self.active = self.rows  # still decoded, in the order of `state`
        self.kinds = {token: kind for kind, token in model.invoke_ids.items()}
        self.delimiters, self.stops = set(model.delimiter_ids), set(model.stop_ids)
        donors, device = policy.donors(self.samples), self.backbone.device
        self.donors = None if donors is None else torch.tensor(donors, device=device)
        self.donated: dict[MemoryKind, Tensor] = {}
        invoked = torch.tensor([KINDS.index(policy.invoked(kind)) for kind in KINDS], device=device)
        words = torch.arange(model.vocabulary, device=device)
        self.standing = torch.cat([words, model.vocabulary + invoked])  # the column that stands where one was picked

        self.prompt = self.given or encode(self.backbone, self.samples, policy.whole)
        opened = policy.opened(self.prompt, self.backbone, self.samples)
        self.visual_tokens = opened.visual.sum(1).tolist()
        added = (opened.mask.sum(1) - self.prompt.mask.sum(1)).tolist()
        for index, row in enumerate(self.rows):
            row.insert([LATENT] * added[index // self.group_size])
        room = self.max_new_tokens + self.limit * (max(map(model.length_of, KINDS)) + 2)
        self.state = DecodeState(model, opened, self.group_size, room, remember=self.limit > 0)

    def steps(self) -> Iterator[list[int]]:
        """Decode to the end; yields the next token of every active row."""
        while True:
            columns, logprobs, forced = self._choose(self.model.logits(self.state.last))
            ids = self.model.token_of(columns)
            tokens = ids.tolist()
            self._record(tokens, logprobs.tolist(), forced)
            yield tokens
            ids = self._drop_finished(ids)
            if not self.active:
                return
            tokens = ids.tolist()
            embed = self.model.embed if self.kinds.keys() & tokens else self.backbone.embedding
            self.state.append(embed(ids)[:, None])
            for kind in KINDS:
                rows = [index for index, token in enumerate(tokens) if token == self.model.invoke_ids[kind]]
                if rows:
                    self._insert(kind, torch.tensor(rows, device=ids.device))

    def rollouts(self) -> list[Rollout]:
        """The rows' records, once all steps are done."""
        return [self._rollout(index, row) for index, row in enumerate(self.rows)]

    # --- the decode state ---

    def _insert(self, kind: MemoryKind, rows: Tensor) -> None:
        """Insert a memory and its end token behind the invoke token of each of `rows`."""
        if self.donors is None:
            memory = self.state.form(kind, rows)
        else:
            memory = self._donated(kind)[self.donors[self.state.sample[rows]]]
        records = [self.active[row] for row in rows.tolist()]
        memory, end = self.policy.latents(memory, _view(records), self.seed), self.model.end_ids[kind]
        self.state.insert(memory, end, rows)
        for record in records:
            record.insert([*[LATENT] * memory.shape[1], end])

    def _donated(self, kind: MemoryKind) -> Tensor:
        """(S, N, d): the memory that each sample forms at its own answer's start, decoded apart from the answers."""
        if kind not in self.donated:
            count = len(self.samples)
            state = DecodeState(self.model, self.prompt, group_size=1, room=1, remember=True)
            invoke = torch.full((count, 1), self.model.invoke_ids[kind], device=self.backbone.device)
            state.append(self.model.embed(invoke))
            self.donated[kind] = state.form(kind, torch.arange(count, device=self.backbone.device))
        return self.donated[kind]

    def _drop_finished(self, ids: Tensor) -> Tensor:
        """Take finished rows out of the batch once they are half of it; returns the tokens of the others."""
        going = [index for index, record in enumerate(self.active) if not record.finished]
        if len(going) > len(self.active) // 2:
            return ids
        keep = torch.tensor(going, dtype=torch.long, device=ids.device)
        self.active = [self.active[index] for index in going]
        if going:
            self.state.keep(keep)
        return ids[keep]

    # --- decisions ---

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
        """The next column of every active row, its log-probability, and whether the policy forced it."""
        forced, invokes = np.full(len(self.active), NONE), logits[:, self.model.vocabulary :]
        if self.limit:
            view = _view(self.active)
            over = (view.invocations >= self.limit) | np.array([r.finished or r.remembering for r in self.active])
            barred = ~self.policy.allowed(view) | over[:, None]
            invokes.masked_fill_(torch.from_numpy(barred).to(logits.device), -torch.inf)
            forced = self.policy.force(view, self.seed)
            forced[over] = NONE
        else:
            invokes.fill_(-torch.inf)
        logprobs = (logits / (self.temperature or 1.0)).log_softmax(-1)
        columns = self._drawn(logprobs)
        if self.limit:
            target = torch.from_numpy(forced).to(columns.device)
            columns = torch.where(target == NONE, self.standing[columns], self.model.vocabulary + target)
        chosen = logprobs.gather(1, columns[:, None])[:, 0]
        return columns, chosen, (forced != NONE).tolist()

    def _drawn(self, logprobs: Tensor) -> Tensor:
        """(R,) the next column of every active row, given the log-probabilities (R, V + 2).

        A row whose invoke token the policy declines draws a word with the same uniform number, rescaled within the
        invoke tokens' share, in which it is uniform again.
        """
        vocabulary, declines = self.model.vocabulary, self.policy.declines
        if self.temperature == 0:
            columns = logprobs.argmax(-1)
            return columns.where(columns < vocabulary, logprobs[:, :vocabulary].argmax(-1)) if declines else columns
        uniform = [record.uniform[record.decisions] for record in self.active]
        cumulative = logprobs.double().exp().cumsum(-1)
        total, words = cumulative[:, -1], cumulative[:, vocabulary - 1]
        drawn = torch.tensor(uniform, dtype=torch.double, device=logprobs.device) * total
        columns = _column_at(cumulative, drawn)
        if declines:
            again = (drawn - words) / (total - words) * words
            columns = columns.where(columns < vocabulary, _column_at(cumulative[:, :vocabulary], again))
        return columns

    def _record(self, tokens: list[int], logprobs: list[float], forced: list[bool]) -> None:
        for record, token, logprob, force in zip(self.active, tokens, logprobs, forced, strict=True):
            if record.finished:
                continue
            if kind := self.kinds.get(token):
                force = force or self.policy.invoked(kind) is not kind  # not what the model asked for
                record.invocations.append(Invocation(len(record.tokens), kind, force))
                record.tokens.append((token, not force, 0.0 if force else logprob))
            else:
                record.tokens.append((token, True, logprob))
                record.answer_length += 1
                record.finished = token in self.stops or record.answer_length >= self.max_new_tokens
            record.decisions += 1
            record.after_delimiter = token in self.delimiters
            record.remembering = kind is not None

    def _rollout(self, index: int, row: _Row) -> Rollout:
        tokenizer = self.backbone.processor.tokenizer
        ids, loss, logprobs = zip(*row.tokens, strict=True)
        spoken = [token for token in ids if token != LATENT and token not in self.model.memory_ids]
        hidden = {LATENT, *self.model.end_ids.values(), *self.stops}
        return Rollout(
            sample_id=self.samples[index // self.group_size].id,
            token_ids=ids,
            loss_mask=loss,
            logprobs=logprobs,
            invocations=tuple(row.invocations),
            text=tokenizer.decode(spoken, skip_special_tokens=True),
            marked_text=tokenizer.decode([token for token in ids if token not in hidden]),
            finished=bool(spoken) and spoken[-1] in self.stops,
            answer_length=row.answer_length,
            visual_tokens=self.visual_tokens[index // self.group_size],
        )


def _column_at(cumulative: Tensor, at: Tensor) -> Tensor:
    """(R,) the first column whose cumulative probability (R, columns) exceeds `at` (R,)."""
    found = torch.searchsorted(cumulative.contiguous(), at[:, None], right=True)[:, 0]
    return found.clamp_max(cumulative.shape[1] - 1)


def _view(records: Sequence[_Row]) -> StepView:
    return StepView(
        keys=tuple(record.key for record in records),
        decision=np.array([record.decisions for record in records]),
        after_delimiter=np.array([record.after_delimiter for record in records]),
        invocations=np.array([len(record.invocations) for record in records]),
    )
