"""The arms of a comparison: a name, what it means, and the invocation policy that decodes it (paper Tables 3 and 9).

A new arm is one more entry in `_ARMS`.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vismem.errors import UserError
from vismem.generation import controls
from vismem.generation import invocation as policies
from vismem.models.kinds import MemoryKind
from vismem.records import VANILLA, VISMEM


@dataclass(frozen=True)
class Arm:
    """One way of decoding. `policy` says when memory is invoked.

    `model` is what is decoded: "vismem", or the baseline of that name in `vismem.steps.BASELINES`.
    """

    name: str
    label: str  # as reports show it
    description: str
    policy: policies.InvocationPolicy
    model: str = VISMEM


def _random(percent: int, label: str) -> Arm:
    chance = "" if percent == 100 else f" with probability {percent / 100:g}"
    description = f"the trained policy; a memory, short or long with equal chance, at the start and delimiters{chance}"
    return Arm(f"random_{percent}", label, description, policies.Random(probability=percent / 100))


def _only(kind: MemoryKind) -> Arm:
    description = f"the trained policy, in which only {kind}-term memory can be invoked"
    return Arm(f"{kind}_only", f"{kind} only", description, policies.Learned(sampled=(kind,)))


def _placed(kind: MemoryKind) -> tuple[Arm, ...]:
    """The arms in which every memory is of one kind, where the policy's own choice does not make it so."""
    forced, at_start = (policies.Random(probability=1.0, kinds=(kind,), limit=limit) for limit in (None, 1))
    everywhere = f"the trained policy; a {kind}-term memory at the start and at every delimiter"
    return (
        Arm(f"forced_{kind}", f"forced {kind}", everywhere, forced),
        Arm(f"start_{kind}", f"{kind} at the start", f"the trained policy; one {kind}-term memory, first", at_start),
        Arm(
            f"as_{kind}",
            f"all as {kind}",
            f"the trained policy asks; each memory formed is {kind}-term",
            controls.OfKind(kind=kind),
        ),
    )


def _baseline(name: str, label: str, description: str, policy: policies.InvocationPolicy | None = None) -> Arm:
    return Arm(name, label, description, policy or policies.Off(), model=name)


_AT_START = policies.Random(limit=1, probability=1.0, kinds=(MemoryKind.SHORT,))
_MATCHED = "the same with as many parameters as VisMem's formation"
_VISION = "the same with a LoRA of the vision encoder, trained together"
_LONG = "the same, trained for about as many seconds as VisMem"
_FULL_RESOLUTION = "the base model, no memory, its images not shrunk to memory.prompt_pixels"
_ARMS = (
    Arm(VANILLA, "vanilla", "the base model, no memory", policies.Off(base=True)),
    Arm(VISMEM, "VisMem", "memory where the trained policy asks for it", policies.Learned()),
    *(_random(percent, f"random {percent} %") for percent in (25, 50, 75)),
    _random(100, "every delimiter"),
    *map(_only, MemoryKind),
    *_placed(MemoryKind.SHORT),
    *_placed(MemoryKind.LONG),
    Arm("no_memory", "memory off", "the trained policy, its adapter on, without memory", policies.Off()),
    Arm("swapped", "swapped", "the trained policy asks; each memory formed is of the other kind", controls.Swapped()),
    Arm("noise", "noise", "the trained policy asks; it gets noise of a memory's mean and spread", controls.Noise()),
    Arm("shuffled", "shuffled", "the trained policy asks; it gets another question's memory", controls.Shuffled()),
    Arm("relook", "relook", "the base model, no memory, its images shown once more", controls.Relook(base=True)),
    Arm("full_resolution", "full resolution", _FULL_RESOLUTION, controls.FullResolution(base=True)),
    _baseline("sft_lora", "SFT-LoRA", "a LoRA of the base, trained on the reference answers"),
    _baseline("sft_lora_matched", "SFT-LoRA, matched", _MATCHED),
    _baseline("sft_lora_long", "SFT-LoRA, longer", _LONG),
    _baseline("sft_lora_vision", "SFT-LoRA, vision too", _VISION),
    _baseline("grpo_lora", "GRPO-LoRA", "a LoRA of the base, trained by GRPO"),
    _baseline("grpo_lora_matched", "GRPO-LoRA, matched", _MATCHED),
    _baseline("grpo_lora_long", "GRPO-LoRA, longer", _LONG),
    _baseline("grpo_lora_vision", "GRPO-LoRA, vision too", _VISION),
    _baseline(
        "static_prefix",
        "static prefix",
        "learned vectors at the answer's start, as many as a short and a long memory; the base is frozen",
        _AT_START,
    ),
    _baseline(
        "continuous",
        "continuous",
        "a memory formed once from the image alone, at the answer's start; the base is frozen",
        _AT_START,
    ),
    _baseline("full", "full fine-tuning", "the base's language model, trained on the reference answers"),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}


def resolve_arms(names: Sequence[str]) -> list[Arm]:
    """The arms by name, in order; `vismem@2` is the arm `vismem` with at most two memories per answer.

    UserError for an unknown or repeated name, a limit that an arm cannot have, or where vanilla is missing.
    """
    for name in names:
        if list(names).count(name) > 1:
            raise UserError(f"evaluate.arms: '{name}' is named twice; name every arm once")
    arms = [_resolved(name) for name in names]
    if VANILLA not in names:
        raise UserError(f"evaluate.arms: '{VANILLA}' is missing; every other arm is compared with it, so add it")
    return arms


def find_arm(name: str) -> Arm | None:
    """The arm of that name, `@N` for a limit of N memories per answer included; None for an unknown one."""
    own, at, limit = name.partition("@")
    arm = ARMS.get(own)
    if arm is None or not at:
        return arm
    if arm.policy.limit is not None or not re.fullmatch("[1-9][0-9]*", limit):
        return None
    return replace(
        arm,
        name=name,
        label=f"{arm.label}, at most {limit}",
        description=f"{arm.description}; at most {limit} per answer",
        policy=replace(arm.policy, limit=int(limit)),
    )


def label(name: str) -> str:
    """An arm's name as reports show it; an unknown one (from an older file) stays as it is."""
    arm = find_arm(name)
    return arm.label if arm else name


def _resolved(name: str) -> Arm:
    arm = find_arm(name)
    if arm:
        return arm
    own, at, limit = name.partition("@")
    if own in ARMS:
        raise UserError(
            f"evaluate.arms: '{name}' is no arm: behind @ stands a limit of memories per answer, from 1 on"
            if ARMS[own].policy.limit is None
            else f"evaluate.arms: '{name}' is no arm: '{own}' has a limit of its own, {ARMS[own].policy.limit}"
        )
    close = difflib.get_close_matches(own, ARMS, n=1, cutoff=0.0)[0]
    known = ", ".join(ARMS)
    raise UserError(f"evaluate.arms: unknown arm '{name}' (did you mean '{close + at + limit}'?); there are {known}")
