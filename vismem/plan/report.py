"""A plan as text of 80 columns, and as JSON values."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from vismem.plan import Plan, Refusal
from vismem.plan.machine import BANDWIDTH_SHARE, CONTEXT, FLOP_SHARE, FRAGMENTS, GIB, LAUNCH
from vismem.plan.rehearsal import REFERENCE, StepPlan

GB = 1e9
NAME, COLUMN = 27, 10


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures in bytes and seconds, with `fits`."""
    return {**asdict(plan), "usable_bytes": round(plan.machine.usable), "fits": not plan.refusals}


def as_text(plan: Plan) -> str:
    """The plan for a reader."""
    machine = plan.machine
    lines = [
        f"{plan.base} ({plan.family}, {plan.dtype}) on {machine.count} x {machine.name}",
        "",
        *_table("parameters, millions", plan.parameters, 1e6),
        *_table("added by VisMem, millions", plan.added, 1e6),
    ]
    for step in plan.steps:
        lines += _step(step, plan)
    lines += [*_table("disk, GB", plan.disk, GB), *_rows("host memory, GB", plan.host, GB), "", *_assumed(plan)]
    return "\n".join(lines) + "\n"


def refused(refusal: Refusal, plan: Plan) -> str:
    """Why a step does not fit, and what to change."""
    solved = [f"{key}: {value}" for key, value in refusal.remedies.items() if value is not None]
    lower = [key for key, value in refusal.remedies.items() if value is None]
    said = [f"set one of {', '.join(solved)}"] * bool(solved) + [f"lower {', '.join(lower)}"] * bool(lower)
    return (
        f"{refusal.step} does not fit: '{refusal.phase}' needs {refusal.bytes / GIB:.1f} GiB of "
        f"{plan.machine.usable / GIB:.1f}, most of it {refusal.part}. To fit, {', or '.join(said)}, or take larger GPUs"
    )


def _step(step: StepPlan, plan: Plan) -> Iterator[str]:
    usable = plan.machine.usable
    facts = [f"{step.rows} answers together"] * bool(step.rows)
    facts += [f"trains {step.trained / 1e6:,.2f} million"] * bool(step.trained)
    facts += [f"{step.seconds:,.0f} s a {'step' if step.trained else 'batch'}"]
    yield f"{step.name}, per GPU: {', '.join(facts)}"
    phases = [phase.name for phase in step.phases]
    yield f"  {'GiB at the peak of':<{NAME}}" + "".join(f"{_short(name):>{COLUMN}}" for name in phases)
    parts = {part: None for phase in step.phases for part, size in phase.parts.items() if size >= GIB / 20}
    for part in parts:
        sizes = [phase.parts.get(part, 0) for phase in step.phases]
        yield f"  {part:<{NAME}}" + "".join(f"{_gib(size):>{COLUMN}}" for size in sizes)
    yield f"  {f'total, of {usable / GIB:.1f}':<{NAME}}" + "".join(
        f"{phase.bytes / GIB:>{COLUMN - 1}.1f}{'!' if phase.bytes > usable else ' '}" for phase in step.phases
    )
    yield ""


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} " if size >= GIB / 20 else "- "


def _short(name: str) -> str:
    """A phase's name as a column has room for it."""
    return name if len(name) < COLUMN else f"{name[: COLUMN - 2]}."


def _table(title: str, sizes: Mapping[str, int], unit: float) -> Iterator[str]:
    yield from _rows(title, sizes, unit)
    yield f"  {'total':<62}{sum(sizes.values()) / unit:>12,.2f}"
    yield ""


def _rows(title: str, sizes: Mapping[str, int], unit: float) -> Iterator[str]:
    yield title
    yield from (f"  {name:<62}{size / unit:>12,.2f}" for name, size in sizes.items())


def _assumed(plan: Plan) -> list[str]:
    machine, (width, height) = plan.machine, plan.image
    memory, bfloat16, float32 = machine.memory / GIB, machine.bfloat16 / 1e12, machine.float32 / 1e12
    return [
        f"Counted by running the steps' code on shapes, with an image of {width}x{height} and about",
        f"200 tokens to a question, answers of full length (reference answers {REFERENCE} tokens) and",
        "all their memories: seconds are upper bounds. Not counted: waiting for other GPUs,",
        "reading images, scoring.",
        f"Assumed: {memory:.1f} GiB a GPU, {CONTEXT / GIB:.1f} of it CUDA's own, {FRAGMENTS:.0%} lost between tensors;",
        f"{FLOP_SHARE:.0%} of {bfloat16:.0f} TFLOP/s in bfloat16 and of {float32:g} in float32,",
        f"{BANDWIDTH_SHARE:.0%} of {machine.bandwidth / 1e12:g} TB/s (NVIDIA's data sheet of the {machine.name}), and",
        f"{LAUNCH * 1e6:.0f} microseconds at least per operation.",
    ]
