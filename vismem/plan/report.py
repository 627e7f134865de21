"""A plan as text of 80 columns."""

from collections.abc import Iterator, Mapping

from vismem.plan import Plan
from vismem.plan.machine import BANDWIDTH_SHARE, CARDS, CONTEXT, FLOP_SHARE, FRAGMENTS, GIB, LAUNCH, Machine
from vismem.plan.rehearsal import BASE, StepPlan

NAME, COLUMN = 27, 10


def as_text(plan: Plan) -> str:
    """The plan for a reader."""
    machine, asked = plan.machine, plan.asked
    (width, height), pictures = asked.size, "an image" if asked.images == 1 else f"{asked.images} images"
    lines = [
        f"{plan.base} on {machine.count} x {machine.name}",
        "All figures are computed, none is measured.",
        "",
        *_table("parameters, millions", plan.parameters, 1e6),
        *_table("added by VisMem, millions", plan.added, 1e6),
        *(line for step in plan.steps for line in _step(step, machine.usable)),
        *_table("disk, GB", plan.disk, 1e9),
        *_table("host memory, GB", plan.host, 1e9, total=False),
        f"The steps' code was run on shapes, with {pictures} of {width}x{height} and about 200 tokens",
        "to a question, answers of full length and all their memories. Seconds leave out",
        "waiting for other GPUs, reading images and scoring.",
        "Hours also leave out the validation before and after.",
        f"Steps are those of {asked.train:,} train questions{', assumed' * (not asked.counted)} (--questions).",
        f"Assumed: {machine.memory / GIB:.1f} GiB per GPU, {CONTEXT / GIB:.1f} of it CUDA's own, {FRAGMENTS:.0%} "
        "lost between tensors;",
        f"{FLOP_SHARE:.0%} of {machine.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16 and of {machine.float32 / 1e12:g} in "
        f"float32, {BANDWIDTH_SHARE:.0%} of {machine.bandwidth / 1e12:g} TB/s",
        "(NVIDIA's data sheet; beside a base in bfloat16 float32 is computed as TF32),",
        f"and at least {LAUNCH * 1e6:.0f} microseconds per operation.",
    ]
    return "\n".join(lines)


def refusals(plan: Plan) -> Iterator[str]:
    """Why steps do not fit, and what to change."""
    for step in plan.steps:
        if step.name not in plan.remedies:
            continue
        phase, remedy = step.phases[step.largest], plan.remedies[step.name]
        changes = " ".join(f"--set {key}={str(value).lower()}" for key, value in (remedy or {}).items())
        ways = [f"with {changes}"] * bool(changes)
        ways += [f"on {name}" for name, card in CARDS.items() if Machine(1, name, *card).usable >= step.bytes][:1]
        why = f"'{step.largest}' needs {step.bytes / GIB:.1f} GiB of {plan.machine.usable / GIB:.1f}"
        why += f", most of it {max(phase, key=phase.__getitem__)}"
        if phase[BASE] > plan.machine.usable and not changes:
            why += f" ({phase[BASE] / GIB:.1f})"
            ways += ["with base.tensor_parallel on more GPUs", "with a smaller base.model"]
        yield f"{step.name} does not fit: {why}; it fits {' or '.join(ways) or 'no card known here'}"


def late(plan: Plan, hours: float) -> Iterator[str]:
    """The steps that a cluster, whose tasks have so many hours, would stop."""
    for step in plan.steps:
        if step.total > 3600 * hours:
            taken = f"{step.name} takes {step.total / 3600:,.0f} h"
            yield f"{taken}, and its task on the cluster is stopped after {hours:g}: set cluster.training_hours"


def _step(step: StepPlan, usable: float) -> Iterator[str]:
    facts = [f"{step.rows} answers together"] * bool(step.rows)
    facts += [f"trains {step.trained / 1e6:,.2f} million"] * bool(step.trained)
    yield f"{step.name}, per GPU: {', '.join(facts)}, {step.seconds:,.0f} s a {'step' if step.trained else 'batch'}"
    if step.steps:
        yield f"  {' and '.join(f'{steps:,}' for steps in step.steps)} steps: {step.total / 3600:,.1f} h"
    phases = step.phases.values()
    yield _row("GiB at the peak of", *step.phases)
    for part in {part: None for parts in phases for part, size in parts.items() if size >= GIB / 20}:
        sizes = [parts.get(part, 0) for parts in phases]
        yield _row(part, *(f"{size / GIB:.1f}" if size >= GIB / 20 else "-" for size in sizes))
    yield _row(f"total, of {usable / GIB:.1f}", *(f"{sum(parts.values()) / GIB:.1f}" for parts in phases))
    yield ""


def _row(name: str, *cells: str) -> str:
    return f"  {name:<{NAME}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)


def _table(title: str, sizes: Mapping[str, float], unit: float, total: bool = True) -> Iterator[str]:
    yield title
    rows = {**sizes, "total": sum(sizes.values())} if total else sizes
    yield from (f"  {name:<62}{size / unit:>12,.2f}" for name, size in rows.items())
    yield ""
