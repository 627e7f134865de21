"""The steps, in order: the only list of them. The CLI, dvc.yaml and the Kubeflow components call what stands here.

`STEPS` are the pipeline. `BASELINES`, which train what the method is compared with, and `SUITE` are no part of it.
"""

import hashlib
import json
import pkgutil
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from vismem.config import Config
from vismem.disk import explain_full_disk
from vismem.errors import UserError
from vismem.files import write_text
from vismem.locks import lock_file
from vismem.provenance import sha256_folder
from vismem.ranks import is_main_rank, is_rank, join_ranks


@dataclass(frozen=True)
class Step:
    """One step: a function `(config, inputs, out) -> line` from folders and typed parameters to one folder.

    `inputs` are the steps whose folders it reads, `sections` the parameter sections that it depends on. Folders of
    the steps in `optional` are handed over where they exist. `about` says what it does, as a command.
    """

    name: str
    target: str  # "module:function", imported only when the step runs
    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    optional: tuple[str, ...] = ()
    about: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """The steps whose folders it takes."""
        return self.inputs + self.optional

    def load(self) -> Callable[..., str]:
        """Import and return the step's function."""
        function: Callable[..., str] = pkgutil.resolve_name(self.target)
        return function


_TRAINED = ("seed", "memory", "invocation", "grpo")  # of a baseline too: the memory says how much VisMem trains
_TRAINS = {
    "sft_lora": "train a LoRA on the reference answers",
    "sft_lora_matched": "train sft_lora with as many parameters as VisMem trains",
    "sft_lora_long": "train sft_lora for as many seconds as VisMem, about",
    "sft_lora_vision": "train sft_lora with a LoRA of the vision encoder too",
    "grpo_lora": "train a LoRA by GRPO",
    "grpo_lora_matched": "train grpo_lora with as many parameters as VisMem trains",
    "grpo_lora_long": "train grpo_lora for as many seconds as VisMem, about",
    "grpo_lora_vision": "train grpo_lora with a LoRA of the vision encoder too",
    "static_prefix": "train vectors without content for the answer's start",
    "continuous": "train a memory of the image alone for the answer's start",
    "full": "train the whole language model on the reference answers",
}
BASELINES: tuple[Step, ...] = tuple(
    Step(name, f"vismem.training.baselines:{name}", ("base", "validate"), (*_TRAINED, "baselines"), about=about)
    for name, about in _TRAINS.items()
)

STEPS: tuple[Step, ...] = (
    Step(
        "prepare",
        "vismem.data.prepare:prepare",
        (),
        ("seed", "prepare"),
        about="turn the data sources into questions with images, by split",
    ),
    Step(
        "validate",
        "vismem.validation.validate:validate",
        ("prepare",),
        ("base", "validate"),  # texts are checked by the base's tokenizer
        about="set bad rows apart, report on the data, stop if it is broken",
    ),
    Step(
        "base",
        "vismem.training.base:base",
        (),
        ("base",),
        about="check the base model for vision and family, and link or copy it",
    ),
    Step(
        "stage1",
        "vismem.training.stage1:stage1",
        ("base", "validate"),
        (*_TRAINED, "stage1"),
        about="train how memories are formed; the base stays as it is",
    ),
    Step(
        "stage2",
        "vismem.training.stage2:stage2",
        ("base", "stage1", "validate"),
        ("seed", "grpo", "stage2"),
        about="train when the model invokes which kind of memory",
    ),
    Step(
        "evaluate",
        "vismem.evaluation.evaluate:evaluate",
        ("base", "stage2", "validate"),
        ("seed", "evaluate"),
        tuple(_TRAINS),
        about="let every arm answer the test questions; scores and report",
    ),
    Step(
        "export",
        "vismem.export.export:export",
        ("base", "stage2", "validate", "evaluate"),
        ("export",),
        about="pack weights, ONNX graphs, model card and lineage",
    ),
    Step(
        "register",
        "vismem.registry.register:register",
        ("export", "evaluate", "validate"),
        ("gate", "registry"),
        about="make a version in MLflow, judged by the gate",
    ),
    Step(
        "promote",
        "vismem.registry.release:promote",
        ("register",),
        ("registry",),
        about="make the version champion if the gate passes it",
    ),
    Step(
        "deploy",
        "vismem.serving.deploy:deploy",
        ("export", "promote", "validate"),
        ("deploy",),
        about="test the version on a real server: Triton where it has graphs, else `vismem api`",
    ),
)

SUITE = Step("suite", "vismem.evaluation.suites:suite", ("base", "stage2"), ("seed", "prepare", "evaluate", "suite"))

BY_NAME: dict[str, Step] = {step.name: step for step in (*STEPS, *BASELINES, SUITE)}
SHARED = ("stage1", "stage2", "evaluate", "suite", *_TRAINS)  # the steps that several processes can share


# Parameters that change what a training holds or keeps, and no result: a run that ended with too little memory goes on
# from its checkpoint with others.
SAME_RESULT: dict[str, Any] = {
    "grpo": {"micro_batch", "gradient_checkpointing", "checkpoint_every", "sample_every"},
    "baselines": {"supervised": {"micro_batch"}},
}


def all_sections(name: str) -> set[str]:
    """The parameter sections of a step and of all steps before it."""
    step = BY_NAME[name]
    return set(step.sections).union(*map(all_sections, step.inputs))


def run_step(name: str, config: Config, artifacts: Path, inputs: Mapping[str, Path] | None = None) -> str:
    """Run one step and return its line. Output appears at `artifacts/NAME` only when the step has succeeded.

    `inputs` maps a step's name to its folder, where that is not `artifacts/NAME` (Kubeflow passes such paths).
    Long steps keep checkpoints in `artifacts/NAME.partial`, from which the next run resumes if it has the same
    parameters and inputs. As one of several processes of torchrun it does its part of a step in `SHARED`; the main
    process owns the folders.
    """
    ranks, main = join_ranks(), is_main_rank()
    if is_rank() and name not in SHARED:
        raise UserError(f"'{name}' runs in one process, not under torchrun. Shared: {', '.join(SHARED)}")
    folders = input_folders(name, artifacts, inputs)
    with (
        _output_folder(name, config, artifacts, folders) if main else nullcontext(artifacts / f"{name}.partial") as out
    ):
        ranks.wait()
        with _tf32(config) if name in SHARED else nullcontext():
            line = BY_NAME[name].load()(config, folders, out)
        ranks.wait()
    ranks.leave()
    return line


def _tf32(config: Config) -> AbstractContextManager[None]:
    from vismem.models.loading import tf32_beside

    return tf32_beside(config.base.dtype)


@contextmanager
def _output_folder(name: str, config: Config, artifacts: Path, folders: Mapping[str, Path]) -> Iterator[Path]:
    """The folder that a step writes to, locked; it becomes `artifacts/NAME` at the block's end.

    What a killed run left there stays if it was made from the same inputs and parameters. UserError where another
    process makes the same output, or the disk is full.
    """
    partial, note, lock = (artifacts / f"{name}.{kind}" for kind in ("partial", "partial.id", "lock"))
    with lock_file(lock, str(partial)), explain_full_disk(partial, artifacts / name):
        made_of = identity(name, config, folders)
        if not (note.is_file() and note.read_text() == made_of):
            if partial.is_dir():
                if any(partial.iterdir()):
                    print(f"{name} begins anew: {partial} was of other parameters, inputs or code", file=sys.stderr)
                shutil.rmtree(partial)
            write_text(note, made_of)
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        replace_folder(partial, artifacts / name)
        note.unlink()
        lock.unlink()


def replace_folder(fresh: Path, out: Path) -> None:
    """Put `fresh` in the place of `out`: by two renames rather than a deletion, so that a kill loses nothing.

    Where it is stopped between the two, `out` is put back. On NFS files that are still open keep their folder.
    """
    for left in out.parent.glob(f"{out.name}.old*"):
        shutil.rmtree(left, ignore_errors=True)
    names = (out.with_name(f"{out.name}.old{number or ''}") for number in count())
    old = next(name for name in names if not name.exists())
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def input_folders(name: str, artifacts: Path, inputs: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """The folder of each step that the step `name` reads. UserError where one is missing that is not optional."""
    step = BY_NAME[name]
    folders = {needed: (inputs or {}).get(needed, artifacts / needed) for needed in step.reads}
    for needed in step.inputs:
        if not folders[needed].is_dir():
            raise UserError(
                f"{name} needs the output of '{needed}', and {folders[needed]} is not there: run `vismem {needed}`"
            )
    return {needed: folder for needed, folder in folders.items() if folder.is_dir()}


def identity(name: str, config: Config, folders: Mapping[str, Path]) -> str:
    """What a step's output is made of: its parameters, without SAME_RESULT, and its inputs, as one hash."""
    values = config.model_dump(mode="json", by_alias=True, exclude=SAME_RESULT)
    sections = {section: values[section] for section in BY_NAME[name].sections}
    parts: list[object] = [sections]
    for section in sections.values():  # an earlier training that this one continues
        start = section.get("start_from") if isinstance(section, dict) else None
        parts += [sha256_folder(Path(start))] if start and Path(start).is_dir() else []
    parts += [{needed: sha256_folder(folder)} for needed, folder in sorted(folders.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
