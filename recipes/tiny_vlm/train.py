"""Trains the tiny VLM from nothing, on the library's own loop."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from recipes.tiny_vlm.card import FACTS, STARTED, begin, write_card
from recipes.tiny_vlm.model import Size, build_model, build_processor
from recipes.tiny_vlm.objectives import Language, Vision
from recipes.tiny_vlm.scenes import SIDES, questions, scope_of
from recipes.tiny_vlm.scores import score, score_coarse, score_split
from recipes.tiny_vlm.sequences import pages
from vismem.data.collate import target_text
from vismem.data.fingerprint import sample_sha256
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.files import read_json
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.models.loading import load_base
from vismem.steps import replace_folder
from vismem.training.loop import LoopSettings, Objective, train

# The phases of the language model, and the shares of what is asked in each, by need; see Language.
SHARES: dict[str, dict[str, float]] = {
    "language": {},
    "detail": {"detail": 0.5},
    **{phase: {"compute": 0.5, "detail": 0.25} for phase in ("compute", "more")},
    "walks": {"compute": 0.25, "detail": 0.5},
}


@dataclass(frozen=True)
class Settings:
    """How much and how fast it learns."""

    size: Size = field(default_factory=Size)
    prompt_pixels: int = 84 * 84  # of a coarse image, at most
    questions: int = 36_000
    vision_steps: int = 800
    language_steps: int = 8000
    detail_steps: int = 3000  # more of the same, detail being asked more and with what answers it
    compute_steps: int = 6000  # more, compute being asked more: it takes longest to learn
    more_steps: int = 6000  # the same once more from the start of its schedule, with other draws
    walks_steps: int = 4000  # more, detail being asked more again: its longest answers take longest to learn
    batch_size: int = 64  # questions per language step
    learning_rate: float = 4e-3  # peak of AdamW
    matrix_learning_rate: float = 0.01  # peak of Muon, on the towers' matrices
    checkpoint_every: int = 100
    scored: int = 460  # fresh questions per picture size and per split
    compared: int = 4000  # of the validation split, before and after `train_longer`


def train_tiny_vlm(out: Path, seed: int, settings: Settings, origin: dict[str, Any]) -> Path:
    """Write a trained tiny VLM with its card to `out`, in Hugging Face format; return `out`.

    `origin` is the `command` and the state of `git` that the card names. A killed run resumes in `OUT.partial` and ends
    with the same weights.
    """
    work = out.with_name(f"{out.name}.partial")
    started = begin(work, {"seed": seed, "settings": asdict(settings)}, origin)
    samples = questions(settings.questions, seed)
    processor = build_processor(text for s in samples for text in (s.question, target_text(s)))
    backbone = Qwen25VLBackbone(build_model(settings.size, processor, seed), processor)
    return save(backbone, samples, settings, fit(backbone, samples, seed, settings, work), work, out, started)


def train_last(out: Path, seed: int, settings: Settings, origin: dict[str, Any]) -> Path:
    """Train the model of `out` for the last phase of `settings`, which it lacks, and put the result in its place.

    Its card also says how the model was made before. A killed run resumes in `OUT.partial`. UserError where it does
    not lack the phase.
    """
    work = out.with_name(f"{out.name}.partial")
    facts = read_json(out / FACTS)
    if (last := [*SHARES][-1]) in facts["loss"]:
        raise UserError(f"{out} has learnt its last phase, {last}: --longer says what more of it would gain")
    before = {name: facts[name] for name in ("command", "git", "data_sha256")}
    started = begin(work, {"seed": seed, "settings": asdict(settings), "before": before}, origin)
    for curve in out.glob("*.csv"):
        shutil.copy(curve, work)
    backbone, samples = load_qwen(out), questions(settings.questions, seed)
    losses = facts["loss"] | fit(backbone, samples, seed, last_phase(settings), work)
    return save(backbone, samples, settings, losses, work, out, started)


def last_phase(settings: Settings) -> Settings:
    """The settings without the steps of the phases before the last."""
    none: dict[str, Any] = {f"{phase}_steps": 0 for phase in ("vision", *SHARES)[:-1]}
    return replace(settings, **none)


def load_qwen(folder: Path) -> Qwen25VLBackbone:
    """The model of the folder."""
    backbone = load_base(folder)
    assert isinstance(backbone, Qwen25VLBackbone)
    return backbone


def save(
    backbone: Qwen25VLBackbone,
    samples: Sequence[Sample],
    settings: Settings,
    losses: dict[str, float],
    work: Path,
    out: Path,
    started: dict[str, Any],
) -> Path:
    """Write the model and its card, with its scores, to `work` and put that in the place of `out`."""
    model = backbone.model.eval()
    model.save_pretrained(work)
    backbone.processor.save_pretrained(work)
    scope_of(samples).write(work)
    facts = {
        **started,
        "data_sha256": hashlib.sha256(b"".join(sample_sha256(sample.as_row()) for sample in samples)).hexdigest(),
        "parameters": model.num_parameters(),
        "loss": losses,
        "scores": {
            "questions": settings.scored,
            "sizes": score(backbone, settings.prompt_pixels, settings.scored, SIDES),
            "splits": {
                split: score_split(backbone, settings.prompt_pixels, split, settings.scored)
                for split in ("pretrain", "validation")
            },
        },
    }
    return finish(work, out, "base.md.j2", facts)


def train_longer(out: Path, seed: int, settings: Settings, origin: dict[str, Any]) -> Path:
    """Train the model of `out` for its last phase once more, and add to its card what that gains; its weights stay.

    A killed run resumes in `OUT.longer.partial`.
    """
    work = out.with_name(f"{out.name}.longer.partial")
    again = last_phase(settings)
    begin(work, {"seed": seed, "settings": asdict(again)}, origin)
    backbone = load_qwen(out)
    before = score_coarse(backbone, settings.prompt_pixels, settings.compared)
    fit(backbone, questions(settings.questions, seed), seed + 1, again, work)  # other draws of the same questions
    after = score_coarse(backbone, settings.prompt_pixels, settings.compared)
    facts = read_json(out / FACTS)
    facts["scores"]["longer"] = {"questions": settings.compared, "before": before, "after": after, **origin}
    write_card(out, facts.pop("template"), facts)
    shutil.rmtree(work)
    return out


def finish(work: Path, out: Path, template: str, facts: dict[str, Any]) -> Path:
    """Write the card, and put what the run has made in the place of `out`."""
    for leftover in (*work.glob("*.checkpoint"), work / STARTED):
        leftover.unlink()
    write_card(work, template, facts)
    replace_folder(work, out)
    return out


def fit(
    backbone: Qwen25VLBackbone, samples: Sequence[Sample], seed: int, settings: Settings, work: Path
) -> dict[str, float]:
    """Train vision, then language; return the last loss of each phase that has steps. On a GPU where there is one."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = backbone.model.to(accelerator.device)
    backbone.prompt_pixels = settings.prompt_pixels
    losses = {}

    def learn(name: str, objective: Objective, module: nn.Module) -> None:
        if not (steps := getattr(settings, f"{name}_steps")):
            return
        model.requires_grad_(False)
        module.requires_grad_(True)
        loop = LoopSettings(
            name,
            steps,
            settings.learning_rate,
            warmup_ratio=0.05,
            matrix_learning_rate=settings.matrix_learning_rate,
            weight_decay=0.01,
            checkpoint_every=settings.checkpoint_every,
        )
        losses[name] = round(train(objective, dict(module.named_parameters()), loop, work, accelerator).last["loss"], 4)

    learn("vision", Vision(backbone, samples, seed), backbone.visual)
    speaking = nn.ModuleDict({"language": model.model.language_model, "head": model.lm_head})
    laid = pages(backbone, samples)
    for phase, shares in SHARES.items():
        learn(phase, Language(backbone, *laid, seed, settings.batch_size, phase, shares), speaking)
    model.requires_grad_(False).cpu()
    return losses
