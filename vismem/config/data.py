"""Where the questions come from, and what the data must satisfy."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from vismem.config.section import Section

Split = Literal["train", "validation", "test"]


class Severity(StrEnum):
    """What a broken rule of the data does: stop the pipeline, set the rows that break it apart, or only say so."""

    ERROR = "error"
    QUARANTINE = "quarantine"
    WARNING = "warning"


class ScenesSource(Section):
    """Generated scenes of coloured shapes with questions asked from the scene's own truth."""

    kind: Literal["scenes"] = "scenes"
    train: int = Field(12000, ge=0, description="questions in the train split [ours]")
    validation: int = Field(400, ge=0, description="questions in the validation split [ours]")
    test: int = Field(1200, ge=0, description="questions in the test split [ours]")
    image_size: int = Field(168, ge=56, description="pixels, both sides; a multiple of 28 [ours]")
    min_objects: int = Field(4, ge=1, description="min objects in a scene [ours]")
    max_objects: int = Field(7, ge=1, description="max objects in a scene [ours]")
    tasks: tuple[str, ...] = Field(
        (
            "count", "retrieve", "compare", "chain",
            "texture", "same", "follow", "tour",
            "alone", "differ", "link", "route",
        ),
        description="task names to draw from, in equal shares; empty means all",
    )  # fmt: skip
    train_tasks: tuple[str, ...] = Field((), description="tasks of the train split only; empty means as `tasks`")


class EasyVqaSource(Section):
    """easy-VQA from its PyPI wheel (MIT): 64x64 images of one shape, 13 answers."""

    kind: Literal["easy_vqa"] = "easy_vqa"
    train: int = Field(400, ge=0, description="questions taken for train")
    validation: int = Field(50, ge=0, description="questions taken for validation, from the wheel's train images")
    test: int = Field(0, ge=0, description="questions taken for test")


class LocalFiles(Section):
    """Files of one split, on disk."""

    split: Split
    limit: int | None = Field(None, ge=1, description="rows at most; null means all")

    def paths(self) -> dict[str, Path]:
        """The paths that it names, by their parameters."""
        return {name: value for name in ("path", "images") if (value := getattr(self, name, None)) is not None}


class JsonlSource(LocalFiles):
    """Your own questions: JSON lines with `id`, `image` or `images` (paths beside the file), `prompt`, `answer`."""

    kind: Literal["jsonl"]
    path: Path = Field(description="the .jsonl file")
    images: Path | None = Field(None, description="the folder that images' paths start at; null: the file's")


class NlvrSource(LocalFiles):
    """NLVR v1.0 (CC-BY-4.0): its repository's layout (a folder with a .json) or Parquet files."""

    kind: Literal["nlvr"]
    path: Path = Field(description="a folder of the repository (train/, dev/), or .parquet: train for train*.parquet")
    directories: tuple[int, ...] = Field((), description="numbered image directories read; empty: all [NLVR README]")


class LmuDataSource(LocalFiles):
    """A benchmark as VLMEvalKit keeps it on disk: `$LMUData/NAME.tsv`."""

    kind: Literal["lmudata"]
    name: str = Field(description="the file's name without .tsv, such as MMStar, BLINK, MUIRBench or MMMU_DEV_VAL")
    path: Path | None = Field(None, description="the folder of .tsv files; null: the environment's LMUData")


LocalSource = JsonlSource | NlvrSource | LmuDataSource


class DvcPath(Section):
    """A file or folder as DVC keeps it in a revision of a Git repository."""

    kind: Literal["dvc"] = "dvc"
    repo: str = Field(".", description="the Git repository with DVC in its root: a URL or a folder")
    rev: str = Field(min_length=1, description="commit, tag or branch; a branch is resolved when `prepare` runs")
    path: Path = Field(description="what is fetched: a file or folder that DVC tracks there")
    md5: str | None = Field(
        None, pattern=r"^[0-9a-f]{32}(\.dir)?$", description="what DVC must say of it there; null: anything"
    )
    remote: str | None = Field(None, description="DVC remote of the repository, by name; null: its default")


class DvcSource(DvcPath):
    """Files of the three kinds above as DVC keeps them in a revision of a Git repository; fetched once per md5."""

    sources: tuple[Annotated[LocalSource, Field(discriminator="kind")], ...] = Field(
        min_length=1, description="how it is read: sources whose paths are the repository's, inside `path`"
    )

    @model_validator(mode="after")
    def _is_fetched(self) -> Self:
        for source in self.sources:
            for place in source.paths().values():
                if not place.is_relative_to(self.path):
                    raise ValueError(f"{place} is not in {self.path}, which is all that is fetched")
            if source.path is None:
                raise ValueError(f"{source.kind} needs `path`, the folder in {self.path} that it is in")
        return self


AnySource = ScenesSource | EasyVqaSource | JsonlSource | NlvrSource | LmuDataSource | DvcSource
Source = Annotated[AnySource, Field(discriminator="kind")]
SOURCES: dict[str, type[Section]] = {get_args(s.model_fields["kind"].annotation)[0]: s for s in get_args(AnySource)}


class InstructionsConfig(Section):
    """What `prepare` writes behind a question, by the kind of its answer; an empty text adds nothing."""

    choice: str = Field(
        "", description="one option; those that a question does not show are added under letters [ours]"
    )
    letters: str = Field("", description="several options, by their letters [ours]")
    yes_no: str = Field("", description="yes or no, true or false [ours]")
    number: str = Field("", description="a number, perhaps with a unit [ours]")
    text: str = Field("", description="any other words [ours]")


class PrepareConfig(Section):
    """Where the questions come from."""

    sources: tuple[Source, ...] = (ScenesSource(),)
    instructions: InstructionsConfig = InstructionsConfig()
    rows_per_shard: int = Field(4096, ge=1, description="rows per Parquet shard")


class ValidateConfig(Section):
    """What the data must satisfy. A broken rule of severity error stops the pipeline."""

    min_pixels: int = Field(28, ge=1, description="min image side in pixels")
    max_pixels: int = Field(4096, ge=1, description="max image side in pixels")
    max_question_chars: int = Field(4000, ge=1, description="longest question or answer in characters")
    max_label_share: float = Field(0.6, gt=0, le=1, description="largest share of one answer within a split (warning)")
    max_quarantined: float = Field(0.05, ge=0, le=1, description="share of bad rows above which the step fails")
    max_task_drift: float = Field(0.1, ge=0, le=1, description="total variation distance of the task mix (warning)")
    max_split_loss: float = Field(0.2, ge=0, le=1, description="share of bad rows of one split above which it fails")
    max_aspect: float = Field(50.0, ge=1, description="longer side of an image, relative to the shorter")
    min_contrast: int = Field(8, ge=0, le=255, description="range of values below which an image is blank (warning)")
    near_duplicate: int = Field(12, ge=0, le=255, description="max difference of images that look alike; 0: not asked")
    severities: dict[str, Severity] = Field({}, description="{rule: error, quarantine or warning} in place of its own")
    expectations: Path | None = Field(None, description="your own rules, YAML as Great Expectations writes it")
    plugins: tuple[Path, ...] = Field((), description="Python files with expectation classes of your own")
    task_profile: Path | None = Field(None, description="stored task mix, JSON {task: share}; null: the train split's")
    required_splits: tuple[Split, ...] = Field(("train", "validation", "test"), description="splits that need rows")


class DriftConfig(Section):
    """When the requests that a server logged differ from the data of its model; `vismem drift`."""

    max_distance: float = Field(
        0.1, gt=0, lt=1, description="largest Kolmogorov-Smirnov distance of a distribution from training's [ours]"
    )
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="share of the log's lines that may be damaged (warning)"
    )
    severities: dict[str, Severity] = Field({}, description="{rule: error or warning} in place of its own")
