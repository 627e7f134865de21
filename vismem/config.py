"""Typed parameters: one frozen section a step, read from `params.yaml`, overlaid by a profile.

Every default below is also written out in `params.yaml` (a test compares the two). Sources in brackets:
[paper] arXiv 2511.11007 with its section; [ours] a choice the paper leaves open; [measured] see docs/results.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vismem.errors import UserError

PROFILE_FOLDER = Path("deploy/profiles")


class Section(BaseModel):
    """A frozen group of parameters; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- prepare ---------------------------------------------------------------------------------------------------------


class ScenesSource(Section):
    """Generated scenes of coloured shapes with questions asked from the scene's own truth."""

    kind: Literal["scenes"] = "scenes"
    train: int = Field(24000, ge=0, description="questions in the train split [ours]")
    validation: int = Field(400, ge=0, description="questions in the validation split [ours]")
    test: int = Field(1200, ge=0, description="questions in the test split [ours]")
    pretrain: int = Field(24000, ge=0, description="questions that only the embedded base is trained on [ours]")
    image_size: int = Field(84, ge=56, description="pixels, both sides; a multiple of 28 [ours]")
    min_objects: int = Field(3, ge=1, description="least objects in a scene; pretrain scenes [ours]")
    max_objects: int = Field(5, ge=1, description="most objects in a scene; pretrain scenes [ours]")
    extra_objects: int = Field(2, ge=0, description="additional objects at most in train/validation/test scenes [ours]")
    tasks: tuple[str, ...] = Field((), description="task names to draw from; empty means all")
    train_tasks: tuple[str, ...] = Field((), description="tasks of the train split only; empty means as `tasks`")


class EasyVqaSource(Section):
    """easy-VQA from its PyPI wheel (MIT): 64x64 images of one shape, 13 answers."""

    kind: Literal["easy_vqa"] = "easy_vqa"
    train: int = Field(400, ge=0, description="questions taken for train")
    validation: int = Field(50, ge=0, description="questions taken for validation, from the wheel's train images")
    test: int = Field(0, ge=0, description="questions taken for test")


class JsonlSource(Section):
    """Your own questions: JSON lines with `id`, `image` or `images` (paths beside the file), `prompt`, `answer`."""

    kind: Literal["jsonl"]
    path: Path = Field(description="the .jsonl file")
    split: Literal["pretrain", "train", "validation", "test"]
    limit: int | None = Field(None, ge=1, description="rows at most; null means all")


class NlvrSource(Section):
    """NLVR v1.0 (CC-BY-4.0): its repository's layout (a folder with a .json) or one Parquet file."""

    kind: Literal["nlvr"]
    path: Path = Field(description="a folder of the repository (train/, dev/), or a .parquet file")
    split: Literal["pretrain", "train", "validation", "test"]
    directories: tuple[int, ...] = Field(
        (), description="numbered image directories read; empty means all [NLVR README]"
    )
    limit: int | None = Field(None, ge=1, description="rows at most; null means all")


SOURCES: dict[str, type[Section]] = {
    "scenes": ScenesSource,
    "easy_vqa": EasyVqaSource,
    "jsonl": JsonlSource,
    "nlvr": NlvrSource,
}
Source = Annotated[ScenesSource | EasyVqaSource | JsonlSource | NlvrSource, Field(discriminator="kind")]


class PrepareConfig(Section):
    """Where the questions come from."""

    sources: tuple[Source, ...] = (ScenesSource(),)
    rows_per_shard: int = Field(4096, ge=1, description="rows a Parquet shard")


# --- validate --------------------------------------------------------------------------------------------------------


class ValidateConfig(Section):
    """What the data must satisfy. A broken rule of severity error stops the pipeline."""

    min_pixels: int = Field(28, ge=1, description="least image side in pixels")
    max_pixels: int = Field(4096, ge=1, description="largest image side in pixels")
    max_question_chars: int = Field(4000, ge=1, description="longest question in characters")
    max_label_share: float = Field(0.6, gt=0, le=1, description="largest share of one answer within a split (warning)")
    max_quarantined: float = Field(0.05, ge=0, le=1, description="share of bad rows above which the step fails")
    max_task_drift: float = Field(0.1, ge=0, le=1, description="total variation distance of the task mix (warning)")
    task_profile: Path | None = Field(None, description="stored task mix, JSON {task: share}; null: the train split's")
    required_splits: tuple[Literal["pretrain", "train", "validation", "test"], ...] = Field(
        ("train", "validation", "test"), description="splits that must have rows"
    )


# --- the models ------------------------------------------------------------------------------------------------------


class BaseConfig(Section):
    """The vision-language model that goes in."""

    model: str = Field(
        "embedded",
        description="hub id or path for from_pretrained; 'embedded' builds and trains a tiny one, 'small' one around "
        "SmolLM2-135M",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="weights' type")
    hidden_size: int = Field(96, description="embedded: width d of the language model")
    layers: int = Field(3, description="embedded: language model layers")
    heads: int = Field(4, description="embedded: attention heads")
    vision_width: int = Field(96, description="embedded, small: width of the vision encoder; a multiple of 32")
    vision_layers: int = Field(3, description="embedded, small: layers of the vision encoder")
    vision_steps: int = Field(250, description="embedded, small: steps that train the vision tower on scenes")
    steps: int = Field(1500, description="embedded, small: steps that train the language model")
    batch_size: int = Field(48, description="embedded, small: questions a step")
    learning_rate: float = Field(4e-3, description="embedded, small: peak rate of AdamW")
    matrix_learning_rate: float = Field(0.01, description="embedded, small: peak rate of Muon on the towers' matrices")
    language_rate: float = Field(2e-4, gt=0, description="small: peak rate of AdamW on the language model")
    interleave: float = Field(
        0.5, ge=0, le=1, description="embedded, small: share of batches that show the images again"
    )


class MemoryConfig(Section):
    """The latent memories (paper Sec. 3.3, Eq. 5-6 and 9-11)."""

    queries: int = Field(8, ge=1, description="K, memory queries [paper 4.1]")
    short_length: int = Field(8, ge=1, description="N_s, vectors of a short-term memory [paper 4.1]")
    long_length: int = Field(16, ge=1, description="N_l, vectors of a long-term memory [paper 4.1]")
    builder_layers: int = Field(2, ge=1, description="layers of the query builder [ours]")
    builder_heads: int = Field(4, ge=1, description="attention heads of the query builder [ours]")
    lora_rank: int = Field(16, ge=1, description="r [paper App.]")
    lora_alpha: float = Field(32, gt=0, description="alpha, the scale is alpha / r [paper App.]")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapters' input, where supervised [paper App.: 0.1]"
    )
    short_start: Literal["patches", "random"] = Field(
        "patches", description="start of the short M_init: pooled patches of the image, or random [measured]"
    )
    long_start: Literal["patches", "random"] = Field(
        "patches", description="start of the long M_init: pooled image tokens of the row, or random [measured]"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of random starts [ours]")


class InvocationConfig(Section):
    """When memory may be invoked (paper Sec. 3.2, Eq. 3-4)."""

    delimiters: tuple[str, ...] = Field((",", ".", ";", ":", "\n", "?", "!"), description="delimiter set [ours]")
    token_start: str = Field("\n", description="delimiter whose embedding the four new rows start as [ours]")
    max_per_answer: int = Field(1, ge=0, description="invocations an answer at most [measured]")
    perturbation: float = Field(0.01, ge=0, description="relative std of the new rows' perturbation [ours]")


# --- training --------------------------------------------------------------------------------------------------------


class WarmStartConfig(Section):
    """Optional supervised start of stage I: cross-entropy of the reference answer through the memories [ours]."""

    steps: int = Field(1600, ge=0, description="steps; 0 leaves it out, as the paper does")
    batch_size: int = Field(32, ge=1, description="questions a step")
    learning_rate: float = Field(3e-3, gt=0, description="peak rate of AdamW")
    matrix_learning_rate: float = Field(
        0.007, ge=0, description="peak rate of Muon on the matrices; 0: AdamW on everything"
    )
    at_start: float = Field(1.0, ge=0, le=1, description="share of memories at the answer's start, else at a delimiter")


class GrpoConfig(Section):
    """Group relative policy optimisation (paper Sec. 3.4, Eq. 7-8 and 12-15)."""

    steps: int = Field(0, ge=0, description="steps; 0 means `epochs` passes over the train split")
    epochs: int = Field(2, ge=1, description="passes over the train split, where steps is 0 [paper]")
    batch_size: int = Field(8, ge=1, description="prompts a step [paper]")
    group_size: int = Field(16, ge=2, description="G, rollouts a prompt [paper]")
    micro_batch: int = Field(64, ge=1, description="rollouts in one backward pass; changes memory, not the result")
    gradient_checkpointing: bool = Field(
        False, description="keep few activations and compute them again in the backward pass; same result, slower"
    )
    updates: int = Field(1, ge=1, description="optimiser steps on one batch of rollouts [paper: 1]")
    learning_rate: float = Field(5e-5, gt=0, description="peak rate of AdamW, cosine decay [paper]")
    warmup_ratio: float = Field(0.2, ge=0, le=1, description="share of the steps that warm up [paper]")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay [ours]")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm clip [ours]")
    clip_low: float = Field(0.2, gt=0, description="lower clip of the ratio [paper]")
    clip_high: float = Field(0.2, gt=0, description="upper clip of the ratio [paper]")
    kl_coefficient: float = Field(0.015, ge=0, description="beta [paper]")
    target_kl: float = Field(0.03, ge=0, description="per token; more KL than this ends a batch's updates; 0: never")
    normalise_by_std: bool = Field(True, description="divide advantages by the group's standard deviation [paper]")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of rollouts [ours]")
    max_new_tokens: int = Field(56, ge=1, description="longest answer in tokens, latents not counted")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    sample_every: int = Field(10, ge=1, description="steps between logged groups of answers")


class Stage1Config(GrpoConfig):
    """Stage I, formation: trains the query builder and both formers; memory is invoked at random."""

    steps: int = Field(40, ge=0, description="steps; 0 means `epochs` passes over the train split")
    learning_rate: float = Field(2e-4, gt=0, description="peak rate; at this size above the paper's [paper: 5e-5]")
    invoke_probability: float = Field(0.5, ge=0, le=1, description="chance of a memory at a delimiter [ours]")
    at_start: bool = Field(True, description="the answer's first position counts as a delimiter [ours]")
    anywhere_after: float = Field(0.5, ge=0, le=1, description="share of the steps after which any position may invoke")
    anywhere_share: float = Field(0.1, ge=0, le=1, description="chance there, relative to invoke_probability [ours]")
    warm_start: WarmStartConfig = WarmStartConfig()


class Stage2Config(GrpoConfig):
    """Stage II, invocation: trains the new tokens' rows, optionally LoRA on the policy."""

    steps: int = Field(120, ge=0, description="steps; 0 means `epochs` passes over the train split")
    group_size: int = Field(8, ge=2, description="G, rollouts a prompt [paper: 16]")
    learning_rate: float = Field(2e-2, gt=0, description="peak rate; only rows are trained [paper: 1e-5]")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up [paper]")
    kl_coefficient: float = Field(0.030, ge=0, description="beta [paper]")
    target_kl: float = Field(0.05, ge=0, description="per token; more KL than this ends a batch's updates")
    start_probability: float = Field(
        0.95, gt=0, lt=1, description="chance of a memory at the answer's start, before training [ours]"
    )
    delimiter_probability: float = Field(
        0.01, gt=0, lt=1, description="chance of a memory after a delimiter, before training [ours]"
    )
    penalty: float = Field(0.3, ge=0, description="alpha, intensity of p_type + p_neg [paper Eq. 15]")
    end_rate: float = Field(0.1, ge=0, le=1, description="learning rate of the end rows, relative [ours]")
    policy_lora: bool = Field(False, description="also train LoRA on the policy's q_proj and v_proj [ours]")


class SupervisedConfig(Section):
    """Supervised fine-tuning on the reference answers, from which VisMem's warm start also learns."""

    steps: int = Field(1600, ge=0, description="steps; 0 means `epochs` passes over the train split")
    epochs: int = Field(2, ge=1, description="passes over the train split, where steps is 0")
    batch_size: int = Field(32, ge=1, description="questions a step")
    micro_batch: int = Field(64, ge=1, description="questions in one backward pass; changes memory, not the result")
    gradient_checkpointing: bool = Field(
        False, description="keep few activations and compute them again in the backward pass; same result, slower"
    )
    learning_rate: float = Field(3e-3, gt=0, description="peak rate of a LoRA")
    full_learning_rate: float = Field(1e-3, gt=0, description="peak rate of full fine-tuning")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")


class BaselinesConfig(Section):
    """What VisMem is compared with: the same base fine-tuned on the same data, `vismem sft_lora` and so on [ours]."""

    rank: int = Field(16, ge=1, description="r of sft_lora and grpo_lora, on q_proj and v_proj [paper App.]")
    alpha: float = Field(32, gt=0, description="alpha at that rank; other ranks keep the scale alpha / r [paper App.]")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapters' input, where supervised [paper App.: 0.1]"
    )
    supervised: SupervisedConfig = SupervisedConfig()
    grpo: GrpoConfig = GrpoConfig(steps=250, learning_rate=1e-3)


# --- evaluation, gate, release ---------------------------------------------------------------------------------------


class EvaluateConfig(Section):
    """Which arms answer the test split, and how their scores are compared."""

    arms: tuple[str, ...] = Field(
        ("vanilla", "vismem", "random_50", "short_only", "long_only"), description="decoding policies compared"
    )
    limit: int | None = Field(None, ge=1, description="test items at most; null means all")
    batch_size: int = Field(64, ge=1, description="rows decoded together")
    max_new_tokens: int = Field(56, ge=1, description="longest answer in tokens")
    bootstrap: int = Field(2000, ge=100, description="bootstrap resamples of the items")


class ExportConfig(Section):
    """The ONNX graphs and their parity with torch."""

    opset: int = Field(18, description="ONNX opset")
    parity_items: int = Field(16, ge=1, description="test items decoded by both engines; greedy tokens must be equal")
    tolerance: float = Field(1e-4, gt=0, description="largest absolute difference of a memory vector")


class GateConfig(Section):
    """What a challenger must show to become champion. Scores are in percentage points."""

    min_gain: float = Field(1.0, description="least overall gain over vanilla, points")
    min_gain_low: float = Field(0.0, description="least lower end of the gain's 95 % interval, points")
    max_capability_drop: float = Field(2.0, ge=0, description="largest loss of any one capability, points")
    max_time_overhead: float = Field(
        1.5, ge=0, description="largest overhead in seconds a sample over vanilla; 0.44 = +44 %, the most in the paper"
    )
    champion_margin: float = Field(0.0, description="points by which the present champion must be exceeded")
    other_data: Literal["pass", "refuse"] = Field(
        "pass", description="the champion rule where the champion was scored on other test data, so no scores compare"
    )


class RegistryConfig(Section):
    """MLflow. The environment's MLFLOW_TRACKING_URI wins over `tracking_uri`."""

    tracking_uri: str = Field("sqlite:///mlflow.db", description="tracking and registry store")
    experiment: str = Field("vismem", description="experiment name")
    model_name: str = Field("vismem", description="registered model name")
    artifact_location: str | None = Field(
        None,
        description="where a new experiment's files go; null: mlartifacts/ beside a SQLite store, else the server's",
    )
    ui_port: int = Field(5000, ge=0, le=65535, description="port of `vismem ui`; 0: any free one")


class DeployConfig(Section):
    """Triton."""

    model_name: str = Field("vismem", description="the served model's name; a refused one is NAME_challenger")
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC port of `vismem serve`; 0: any free one")
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP port")
    metrics_port: int = Field(8002, ge=0, le=65535, description="Prometheus port")


class StudyConfig(Section):
    """`vismem study`: the method against its baselines and ablations, repeated with several seeds."""

    seeds: int = Field(3, ge=1, description="repetitions, with the seeds `seed`, `seed` + 1 and so on")
    arms: tuple[str, ...] = Field(
        (
            "vanilla", "vismem", "short_only", "long_only", "random_25", "random_50", "random_75", "random_100",
            "relook", "noise", "shuffled", "swapped",
            "sft_lora", "grpo_lora", "grpo_lora_matched",
        ),
        description="arms that answer the test split; those named like a baseline are also trained",
    )  # fmt: skip
    transfer_seeds: int = Field(1, ge=0, description="repetitions that also train on half of the tasks; 0: none")
    transfer_arms: tuple[str, ...] = Field(
        ("vanilla", "vismem", "sft_lora"), description="arms of that; vanilla is VisMem with memory off"
    )
    jobs: int = Field(2, ge=1, description="steps that run at a time, one thread each")


class Config(Section):
    """All parameters."""

    seed: int = Field(0, ge=0, description="seed of every random choice")
    prepare: PrepareConfig = PrepareConfig()
    validate_: ValidateConfig = Field(ValidateConfig(), alias="validate")
    base: BaseConfig = BaseConfig()
    memory: MemoryConfig = MemoryConfig()
    invocation: InvocationConfig = InvocationConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    baselines: BaselinesConfig = BaselinesConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    deploy: DeployConfig = DeployConfig()
    study: StudyConfig = StudyConfig()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(path: Path, profile: str | None = None) -> Config:
    """Read `path` (YAML) and overlay the named profile of `deploy/profiles/` beside it.

    Raises UserError for a missing file, an unknown profile, an unknown key (naming the nearest right one) or a value
    of the wrong type.
    """
    return parse_config(load_params(path, profile), str(path))


def load_params(path: Path, profile: str | None = None) -> dict[str, Any]:
    """The plain mapping behind `load_config`: the file's values with the profile's laid over them."""
    values = _read_yaml(path)
    if profile is not None:
        folder = path.parent / PROFILE_FOLDER
        overlay = folder / f"{profile}.yaml"
        if not overlay.is_file():
            known = sorted(p.stem for p in folder.glob("*.yaml"))
            raise UserError(f"unknown profile '{profile}'{_nearest(profile, known)}; {folder} has: {', '.join(known)}")
        values = merge(values, _read_yaml(overlay))
    return values


def parse_config(values: dict[str, Any], where: str = "params") -> Config:
    """Check a plain mapping and return the typed parameters. UserError lists every fault with its place."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(fault, values) for fault in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, key by key; lists are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no parameter file {path}: run in the project's root, or name one with --params")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    return values


def _explain(fault: Any, values: dict[str, Any]) -> str:
    place = [str(part) for part in fault["loc"] if part not in SOURCES]
    where = ".".join(place)
    if fault["type"] != "extra_forbidden":
        return f"'{where}': {fault['msg']} (got {fault['input']!r})"
    return f"unknown key '{where}'{_nearest(place[-1], _keys_at(list(fault['loc'][:-1])))}"


def _keys_at(place: list[Any]) -> list[str]:
    """The names allowed in the section at `place`."""
    section: Any = Config
    for part in place:
        if section is Config or (isinstance(section, type) and issubclass(section, Section)):
            fields = {(field.alias or name): field for name, field in section.model_fields.items()}
            section = fields[part].annotation if part in fields else None
        elif part in SOURCES:
            section = SOURCES[part]
    if isinstance(section, type) and issubclass(section, Section):
        return [field.alias or name for name, field in section.model_fields.items()]
    return []


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
