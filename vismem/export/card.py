"""The model card: what a bundle is, how good, from what, its limits and how to run it, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from vismem.config import DEFAULT_BASE, Config, GrpoConfig, GrpoStageConfig
from vismem.evaluation.arms import find_arm, label
from vismem.evaluation.metrics import CAPABILITIES
from vismem.evaluation.summary import headline
from vismem.models.vismem import VisMemModel
from vismem.records import OVERALL, VISMEM, Metrics, ParityReport

PICTURE = "scores.png"  # beside the card


def model_card(
    config: Config, model: VisMemModel, metrics: Metrics, parity: ParityReport, lineage: Mapping[str, Any]
) -> str:
    """The card's text, with the metadata that the Hugging Face hub reads. `lineage` is that of `vismem.provenance`.

    Raises jinja2.UndefinedError where it lacks a figure that the card shows.
    """
    tiny = config.base.model == DEFAULT_BASE
    hub = config.base.folder() is None
    # A hub id as it stands; of a path only its last part, which tells nothing of the machine.
    shown = config.base.model if hub else config.base.model.rstrip("/").rsplit("/", 1)[-1]
    arms = metrics.arms

    def score(arm: str, group: str) -> str:
        low, high = metrics.intervals[arm][group]
        return f"{arms[arm][group]:.1f} ({low:.1f} to {high:.1f})"

    def gain(group: str) -> str:
        low, high = metrics.gain[group].ci95
        return f"{metrics.gain[group].delta:+.1f} ({low:+.1f} to {high:+.1f})"

    loader = PackageLoader("vismem.export", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    size = {name: sum(value.numel() for value in part.parameters()) for name, part in model.named_children()}
    policy = size["tokens"] + (size["policy_lora"] if model.policy_lora.enabled else 0)
    memory = size["builder"] + size["short"] + size["long"]
    sources = [
        f"{source.kind} ({path.name})" if (path := getattr(source, "path", None)) else source.kind
        for source in config.prepare.sources
    ]
    return environment.get_template("card.md.j2").render(
        base_name="the tiny VLM" if tiny else shown,
        metadata=_metadata(config.base.model if hub else None, "apache-2.0" if tiny else "other", metrics, sources),
        picture=PICTURE,
        base_licence="Apache-2.0 (trained by this project)" if tiny else "as published by their authors",
        base=f"`{DEFAULT_BASE}`, a tiny Qwen2.5-VL trained by this project" if tiny else shown,
        tiny=tiny,
        model=model,
        parameters={
            "base": _count(model.backbone.model.num_parameters()),
            "memory": _count(memory),
            "policy": _count(policy),
        },
        sources=sources,
        stages=(_stage(config.stage1, config.grpo), _stage(config.stage2, config.grpo)),
        max_positions=model.backbone.model.config.text_config.max_position_embeddings,
        headline=headline(metrics),
        groups=[name for name in (*CAPABILITIES, OVERALL) if name in next(iter(arms.values()))],
        label=label,
        descriptions={name: arm.description for name in arms if (arm := find_arm(name))},
        score=score,
        gain=gain,
        metrics=metrics,
        parity=parity,
        dtype=config.base.dtype,
        lineage=lineage,
    )


def _metadata(base: str | None, licence: str, metrics: Metrics, sources: Sequence[str]) -> str:
    """The card's front matter: what the hub lists, finds and ranks a model by. `base`: its hub id, where it has one."""
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=sources[0].split()[0],
            dataset_name=f"{', '.join(sources)}: {metrics.n} test questions",
            dataset_split="test",
            metric_type="accuracy",
            metric_name="accuracy (%)",
            metric_value=round(metrics.arms[arm][OVERALL], 1),
        )
        for arm in metrics.arms
        if arm == VISMEM
    ]
    card = ModelCardData(
        model_name="VisMem",
        license=licence,
        library_name="vismem",
        pipeline_tag="image-text-to-text",
        tags=["latent-memory", "visual-question-answering", "onnx"],
        metrics=["accuracy"],
        eval_results=results,
        base_model=base,
        base_model_relation="adapter" if base else None,
    )
    return card.to_yaml()


def _stage(stage: GrpoStageConfig, grpo: GrpoConfig) -> str:
    length = f"{stage.steps} steps" if stage.steps else f"{grpo.epochs} passes"
    warm = getattr(stage, "warm_start", None)
    start = f"{warm.steps} supervised steps, then " if warm is not None and warm.steps else ""
    return (
        f"{start}GRPO, {length} of {grpo.batch_size} prompts with {stage.group_size} rollouts each, "
        f"learning rate {stage.learning_rate:g}, KL coefficient {stage.kl_coefficient:g}"
    )


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
