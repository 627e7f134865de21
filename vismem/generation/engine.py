"""The one rollout engine: batched decoding in which each row invokes memories by itself (paper Sec. 3.2, Eq. 4).

Every row owns its slots in the cache. Rows that invoke a memory leave the others alone: their latents and end token
are inserted in one pass over those rows only, and all rows go on together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vismem.data.sample import Sample
from vismem.generation.cache import RowCache
from vismem.generation.invocation import NONE, InvocationPolicy, StepView, draws, row_key
from vismem.generation.prompts import encode, last_of, visual_states
from vismem.generation.types import LATENT, Invocation, MemoryKind, Rollout
from vismem.models.backbones.base import PatchStream
from vismem.models.memory import causal_mask
from vismem.models.tokens import KINDS
from vismem.models.vismem import State, VisMemModel


@torch.no_grad()
def generate(
    model: VisMemModel,
    samples: Sequence[Sample],
    policy: InvocationPolicy,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    group_size: int = 1,
) -> list[Rollout]:
    """Decode `group_size` answers a sample; rollouts come grouped by sample, in order.

    `temperature` 0 is greedy. Sampling draws depend on the seed, the sample's id and the member of the group, so an
    answer is the same whatever else is in the batch.
    """
    if not samples:
        return []
    return _Decoder(model, samples, policy, max_new_tokens, temperature, seed, group_size).run()


class _Row:
    """The record of one row's answer."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.tokens: list[int] = []
        self.loss: list[bool] = []
        self.logprobs: list[float] = []
        self.invocations: list[Invocation] = []
        self.decisions = 0
        self.answer_length = 0
        self.after_delimiter = False
        self.remembering = False  # a memory was inserted, and no word has followed it yet
        self.finished = False

    def add(self, token: int, loss: bool, logprob: float) -> None:
        self.tokens.append(token)
        self.loss.append(loss)
        self.logprobs.append(logprob)


class _Decoder:
    def __init__(
        self,
        model: VisMemModel,
        samples: Sequence[Sample],
        policy: InvocationPolicy,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        group_size: int,
    ) -> None:
        self.model, self.backbone, self.policy = model, model.backbone, policy
        self.samples, self.group_size = samples, group_size
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.limit = model.invocation_config.max_per_answer if policy.limit is None else policy.limit
        self.rows = [_Row(row_key(s.id, member)) for s in samples for member in range(group_size)]
        self.uniform = np.stack([draws(seed, row.key, "sample", max_new_tokens + self.limit) for row in self.rows])
        self.delimiters, self.stops = set(model.delimiter_ids), set(model.stop_ids)

    def run(self) -> list[Rollout]:
        last = self._prefill()
        while not all(row.finished for row in self.rows):
            last = self._drop_finished(last)
            columns, logprobs, forced = self._choose(self.model.logits(last))
            tokens = self.model.token_of(columns)
            self._record(tokens.tolist(), logprobs.tolist(), forced)
            last = self._forward(self.model.embed(tokens)[:, None], None)[:, -1]
            for index, kind in enumerate(KINDS):
                rows = (columns == self.model.vocabulary + index).nonzero()[:, 0]
                if len(rows):
                    last[rows] = self._insert(kind, rows)
        return [self._rollout(index, row) for index, row in enumerate(self.rows)]

    # --- the stream: every row's embeddings, hidden states and positions, by slot ---

    def _prefill(self) -> Tensor:
        prompt = encode(self.backbone, self.samples)
        room = self.limit * (max(self.model.length_of(kind) for kind in KINDS) + 2)
        longest = prompt.embeds.shape[1]
        self.cache = RowCache(longest + self.max_new_tokens + room)
        slots = torch.arange(longest, device=prompt.mask.device).expand(len(self.samples), -1)
        self.cache.place(slots, longest)
        hidden = self.backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask), self.cache)
        self.visual = visual_states(prompt, hidden)
        self.prompt = prompt
        self.patches: PatchStream | None = None
        last = last_of(hidden, prompt.mask)

        rows = len(self.rows)
        self.sample = torch.arange(len(self.samples), device=last.device).repeat_interleave(self.group_size)
        self.active = torch.arange(rows, device=last.device)
        self.used = prompt.mask.sum(1)[self.sample]
        self.next = prompt.next_position()[self.sample]
        self.segment = self.used.clone()
        if self.group_size > 1:
            self.cache.select(self.sample)
        if self.limit:  # only memories read the stream again
            shape = (rows, self.cache.capacity, hidden.shape[-1])
            self.stream, self.hidden = prompt.embeds.new_zeros(shape), hidden.new_zeros(shape)
            self.positions = prompt.positions.new_zeros(3, rows, self.cache.capacity)
            self.stream[:, :longest] = prompt.embeds[self.sample]
            self.positions[:, :, :longest] = prompt.positions[:, self.sample]
        return last[self.sample]

    def _forward(self, embeds: Tensor, rows: Tensor | None) -> Tensor:
        """Append (R, T, d) embeddings to the active rows (or to `rows` of them); returns their hidden states."""
        index = torch.arange(len(self.active), device=embeds.device) if rows is None else rows
        offsets = torch.arange(embeds.shape[1], device=embeds.device)
        slots = self.used[index][:, None] + offsets
        positions = (self.next[index][:, None] + offsets).expand(3, -1, -1)
        limit = int(slots.max()) + 1
        self.cache.place(slots, limit, rows)
        mask = torch.arange(limit, device=embeds.device) <= slots[:, None, :, None]
        hidden = self.backbone.language(embeds, positions, mask, self.cache)
        if self.limit:
            self.stream[index[:, None], slots] = embeds
            self.hidden[index[:, None], slots] = hidden
            self.positions[:, index[:, None], slots] = positions
        self.used[index] += embeds.shape[1]
        self.next[index] += embeds.shape[1]
        return hidden

    def _insert(self, kind: MemoryKind, rows: Tensor) -> Tensor:
        """Form a memory for each of `rows`, insert it and its end token; returns the end tokens' hidden states."""
        memory = self.model.form(kind, self._state(kind, rows))
        end = torch.full((len(rows), 1), self.model.end_ids[kind], device=memory.device)
        hidden = self._forward(torch.cat([memory, self.model.embed(end)], dim=1), rows)
        self.segment[rows] = self.used[rows]
        for row in self.active[rows].tolist():
            for token in (*[LATENT] * memory.shape[1], self.model.end_ids[kind]):
                self.rows[row].add(token, False, 0.0)
        return hidden[:, -1]

    def _state(self, kind: MemoryKind, rows: Tensor) -> State:
        sample, used, start = self.sample[rows], self.used[rows], self.segment[rows]
        longest = int((used - start).max())
        slots = start[:, None] + torch.arange(longest, device=rows.device)
        segment = self.hidden[rows[:, None], slots.clamp_max(self.cache.capacity - 1)]
        stream_length = int(used.max())
        if kind is MemoryKind.SHORT and self.patches is None:
            self.patches = self.model.short_stream(self.prompt.vision)
        return State(
            sample=sample,
            cognitive=torch.cat([self.visual.hidden[sample], segment], dim=1),
            cognitive_mask=torch.cat([self.visual.mask[sample], slots < used[:, None]], dim=1),
            stream=self.stream[rows, :stream_length],
            positions=self.positions[:, rows, :stream_length],
            stream_mask=torch.arange(stream_length, device=rows.device) < used[:, None],
            stream_visual=pad(self.prompt.visual[sample], (0, stream_length - self.prompt.visual.shape[1])),
            patches=self.patches,
        )

    def _drop_finished(self, last: Tensor) -> Tensor:
        """Take finished rows out of the batch once they are half of it."""
        going = [i for i, row in enumerate(self.active.tolist()) if not self.rows[row].finished]
        if len(going) > len(self.active) // 2:
            return last
        keep = torch.tensor(going, device=last.device)
        self.cache.select(keep)
        for name in ("active", "sample", "used", "next", "segment"):
            setattr(self, name, getattr(self, name)[keep])
        if self.limit:
            self.stream, self.hidden, self.positions = self.stream[keep], self.hidden[keep], self.positions[:, keep]
        return last[keep]

    # --- decisions ---

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
        """The next column of every active row, its log-probability, and whether the policy forced it."""
        records = [self.rows[row] for row in self.active.tolist()]
        count = np.array([len(record.invocations) for record in records])
        decided = np.array([record.decisions for record in records])
        view = StepView(
            tuple(record.key for record in records),
            decided,
            np.array([record.after_delimiter for record in records]),
            count,
        )
        over = (count >= self.limit) | np.array([record.finished or record.remembering for record in records])
        barred = ~self.policy.allowed(view) | over[:, None]
        logits[:, self.model.vocabulary :].masked_fill_(torch.from_numpy(barred).to(logits.device), -torch.inf)
        if self.temperature == 0:
            logprobs = logits.log_softmax(-1)
            columns = logprobs.argmax(-1)
        else:
            logprobs = (logits / self.temperature).log_softmax(-1)
            uniform = torch.from_numpy(self.uniform[self.active.cpu().numpy(), decided]).to(logits.device)
            cumulative = logprobs.double().exp().cumsum(-1)
            scaled = (uniform * cumulative[:, -1])[:, None]
            columns = torch.searchsorted(cumulative, scaled, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
        forced = self.policy.force(view, self.seed)
        forced[over] = NONE
        target = torch.from_numpy(forced).to(columns.device)
        columns = torch.where(target == NONE, columns, self.model.vocabulary + target)
        chosen = logprobs.gather(1, columns[:, None])[:, 0]
        return columns, chosen, (forced != NONE).tolist()

    def _record(self, tokens: list[int], logprobs: list[float], forced: list[bool]) -> None:
        kinds = {token: kind for kind, token in self.model.invoke_ids.items()}
        for row, token, logprob, force in zip(self.active.tolist(), tokens, logprobs, forced, strict=True):
            record = self.rows[row]
            if record.finished:
                continue
            if token in kinds:
                record.invocations.append(Invocation(len(record.tokens), kinds[token], force))
                record.add(token, not force, 0.0 if force else logprob)
            else:
                record.add(token, True, logprob)
                record.answer_length += 1
                stopped = token in self.stops
                record.finished = stopped or record.answer_length >= self.max_new_tokens
            record.decisions += 1
            record.after_delimiter = token in self.delimiters
            record.remembering = token in kinds

    def _rollout(self, index: int, row: _Row) -> Rollout:
        tokenizer = self.backbone.processor.tokenizer
        spoken = [t for t in row.tokens if t != LATENT and t not in self.model.memory_ids]
        ends = set(self.model.end_ids.values())
        marked = [t for t in row.tokens if t != LATENT and t not in ends and t not in self.stops]
        return Rollout(
            sample_id=self.samples[index // self.group_size].id,
            token_ids=tuple(row.tokens),
            loss_mask=tuple(row.loss),
            logprobs=tuple(row.logprobs),
            invocations=tuple(row.invocations),
            text=tokenizer.decode(spoken, skip_special_tokens=True),
            marked_text=tokenizer.decode(marked, skip_special_tokens=False),
            finished=bool(spoken) and spoken[-1] in self.stops,
            answer_length=row.answer_length,
        )
