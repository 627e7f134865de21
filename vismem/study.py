"""`vismem study`: the method, its ablations and its baselines with several seeds, and transfer to tasks not trained on.

Every seed has a folder with the artifacts of the steps, `seed-N/`; `transfer-N/` has those that train on half of the
tasks, on the same base. No choice is made here, and the test split is answered once, by the step `evaluate`.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from vismem.config import Config, ScenesSource
from vismem.errors import UserError
from vismem.jobs import Job, run_jobs
from vismem.params_file import render_params
from vismem.steps import BASELINES, BY_NAME, is_done

PARAMS = "params.yaml"
TRAINED = ("prepare", "validate", "base", "stage1", "stage2")


def study(config: Config, folder: Path, command: str, write: Path | None = None) -> str:
    """Run what is missing, and write `folder/report.md`, `report.json` and `study.png`; return the result in a line.

    `command` is what the report says it was made with; `write` is a Markdown file that gets a copy, the plot beside it.
    UserError where a step fails; a later call goes on from there.
    """
    _check_arms(config)
    console = Console(stderr=True)
    run_jobs(plan(config, folder), folder, config.study.jobs, console)
    from vismem.evaluation.study_report import write_report  # heavy

    with console.status("the report"):
        line = write_report(config, folder, command, write)
    return line


def seeds(config: Config) -> list[int]:
    """The seeds of the repetitions."""
    return [config.seed + repetition for repetition in range(config.study.seeds)]


def transfer_seeds(config: Config) -> list[int]:
    """The seeds with which half of the tasks are trained; none where no source has tasks to choose from."""
    if not any(isinstance(source, ScenesSource) for source in config.prepare.sources):
        return []
    return seeds(config)[: config.study.transfer_seeds]


def plan(config: Config, folder: Path) -> list[Job]:
    """Write each repetition's parameters and return all jobs, one a step of a repetition, named FOLDER/STEP.

    Evaluations are timed jobs: seconds a sample are measured when no training runs, one thread each, at most an
    evaluation of another seed beside.
    """
    jobs: list[Job] = []
    for seed in seeds(config):
        jobs += _repetition(of_seed(config, seed, config.study.arms), folder, f"seed-{seed}")
    for seed in transfer_seeds(config):
        variant = on_half(of_seed(config, seed, config.study.transfer_arms))
        jobs += _repetition(variant, folder, f"transfer-{seed}", base=f"seed-{seed}")
    return jobs


def of_seed(config: Config, seed: int, arms: Sequence[str]) -> Config:
    """The parameters of one repetition."""
    return config.model_copy(
        update={"seed": seed, "evaluate": config.evaluate.model_copy(update={"arms": tuple(arms)})}
    )


def on_half(config: Config) -> Config:
    """The same with a train split of half of the tasks, and no other sources; the base is not trained again."""
    sources = tuple(
        source.model_copy(update={"train_tasks": trained_half(source.tasks)})
        for source in config.prepare.sources
        if isinstance(source, ScenesSource)
    )
    return config.model_copy(update={"prepare": config.prepare.model_copy(update={"sources": sources})})


def trained_half(tasks: Sequence[str] = ()) -> tuple[str, ...]:
    """The tasks that transfer trains on: of each capability every other one, in the order of `vismem.data.tasks`.

    A capability with a single task among `tasks` (empty: all) is trained on.
    """
    from vismem.data.tasks import TASKS

    chosen: list[str] = []
    for capability in dict.fromkeys(TASKS.values()):
        chosen += [task for task in TASKS if TASKS[task] == capability and (not tasks or task in tasks)][::2]
    return tuple(chosen)


def _repetition(config: Config, folder: Path, name: str, base: str | None = None) -> list[Job]:
    """The jobs of one folder. `base` names the folder whose base they use, if not their own."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    text = render_params(config)
    if not (place / PARAMS).is_file() or (place / PARAMS).read_text() != text:
        (place / PARAMS).write_text(text)
    if base is not None and not (place / "base").is_symlink():
        (place / "base").symlink_to(Path("..") / base / "base")
    baselines = [step.name for step in BASELINES if step.name in config.evaluate.arms]
    jobs = []
    for step in (*TRAINED, *baselines, "evaluate"):
        if step == "base" and base is not None:
            continue
        needs = [*BY_NAME[step].inputs, *(baselines if step == "evaluate" else ())]
        owners = {needed: base if needed == "base" and base is not None else name for needed in needs}
        jobs.append(
            Job(
                name=f"{name}/{step}",
                command=(
                    sys.executable, "-m", "vismem.cli", step, "--if-needed",
                    "--params", os.fspath(place / PARAMS), "--artifacts", os.fspath(place),
                ),
                needs=tuple(f"{owner}/{needed}" for needed, owner in owners.items()),
                timed=step == "evaluate",
                is_done=partial(is_done, step, config, place),
            )
        )  # fmt: skip
    return jobs


def _check_arms(config: Config) -> None:
    """UserError for an arm that does not exist, before hours are spent."""
    from vismem.evaluation.arms import resolve_arms

    for names in (config.study.arms, config.study.transfer_arms):
        try:
            resolve_arms(names)
        except UserError as error:
            raise UserError(f"study: {error}") from None
