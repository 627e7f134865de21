"""NLVR from end to end, on hand-made wide pictures in its layouts: a base for them, the profile, the scores."""

import dataclasses
import io
import json
import random
import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from recipes.tiny_vlm.boxes import Item, Scene, picture
from recipes.tiny_vlm.model import Size, build_model, build_processor
from recipes.tiny_vlm.objectives import answer_loss
from recipes.tiny_vlm.sequences import stack
from recipes.tiny_vlm.wide import PIXELS, Reading, Sight, WideSettings, fresh_score, train_wide
from vismem.config import load_config
from vismem.data.readers import nlvr
from vismem.data.sample import Sample
from vismem.files import read_json
from vismem.generation.prompts import encode, target_ids
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.provenance import file_hashes
from vismem.steps import run_step

ROOT = Path(__file__).parents[2]
SETTINGS = WideSettings(
    Size(32, 2, 2, 32, 2),
    scenes=6,
    questions=3,
    vision_steps=2,
    shapes_only=1,
    language_steps=2,
    batch=2,
    asked=2,
    fresh=9,
)
ORIGIN = {"command": "the command", "git": {"commit": "0123abc", "dirty": False}}
TOWERS: Scene = [
    [Item(0, 40, 80, 20, "black", "block"), Item(0, 40, 59, 20, "blue", "block")],
    [Item(1, 40, 80, 20, "yellow", "block")],
    [Item(2, 40, 80, 20, "blue", "block")],
]
SHAPES: Scene = [
    [Item(0, 0, 30, 10, "yellow", "circle"), Item(0, 40, 40, 20, "black", "square")],
    [Item(1, 70, 70, 30, "blue", "triangle")],
    [Item(2, 45, 10, 20, "yellow", "circle")],
]


def orders(scene: Scene) -> list[Scene]:
    """The scene with its boxes in another order each time."""
    return [[[dataclasses.replace(i, box=at) for i in scene[(at + k) % 3]] for at in range(3)] for k in range(2)]


def repository(folder: Path) -> Path:
    """`train` of directories 1 and 36 and `dev` of directory 1, a presentation each of two sentences in two orders."""
    places = [("train", 0, 1), ("train", 1, 36), ("dev", 2, 1), ("dev", 3, 1)]
    for split, number, directory in places:
        images = folder / split / "images" / str(directory)
        images.mkdir(parents=True, exist_ok=True)
        with (folder / split / f"{split}.json").open("a") as file:
            for label, m in (("true", 0), ("false", 2)):
                scene = (TOWERS, SHAPES)[number % 2] if m else (SHAPES, TOWERS)[number % 2]
                moved = [[dataclasses.replace(i, top=i.top - number) for i in box] for box in scene]  # no leakage
                row = {"identifier": f"{number}-{m}", "directory": str(directory), "label": label}
                file.write(json.dumps({**row, "sentence": f"There is a blue tower, no {number}."}) + "\n")
                for k, ordered in enumerate(orders(moved)):
                    (images / f"{split}-{number}-{m}-{k}.png").write_bytes(picture(ordered))
    return folder


def profile(data: Path, base: Path) -> dict[str, Any]:
    """Overrides that make the profile a miniature: the same sources and steps, a few of each."""
    sources = [s.model_dump(mode="json") for s in load_config(ROOT / "params.yaml", "nlvr").prepare.sources]
    for source in sources:
        source["path"] = str(data / Path(source["path"]).name)
    small = {"grpo.batch_size": 2, "stage1.group_size": 2, "stage2.group_size": 2, "evaluate.bootstrap": 100}
    steps = {"stage1.steps": 1, "stage2.steps": 1, "stage1.warm_start": {"steps": 1, "batch_size": 2}}
    return {"prepare.sources": sources, "base.model": str(base), "memory.lora_rank": 4, **small, **steps}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_wide(tmp_path_factory.mktemp("base") / "wide", 0, SETTINGS, ORIGIN)


@pytest.fixture(scope="module")
def backbone() -> Qwen25VLBackbone:
    """Untrained."""
    processor = build_processor(
        ["true or false: There is a box a answer: true false how many 1 2 3"] * 9, PIXELS - 400, PIXELS
    )
    return Qwen25VLBackbone(build_model(SETTINGS.size, processor, 0), processor)


def test_the_profile_trains_and_scores_and_counts_the_box_orders_of_a_presentation_as_one(
    base: Path, tmp_path: Path
) -> None:
    config = load_config(ROOT / "params.yaml", "nlvr", profile(repository(tmp_path / "nlvr"), base))
    for name in ("prepare", "validate", "base", "stage1", "stage2", "evaluate"):
        run_step(name, config, tmp_path / "artifacts")
    metrics = read_json(tmp_path / "artifacts" / "evaluate" / "metrics.json")
    assert (metrics["n"], metrics["clusters"]["overall"]) == (8, 2)
    assert set(metrics["arms"]) == {"vanilla", "vismem", "no_memory"}
    assert (tmp_path / "artifacts" / "evaluate" / "report.html").is_file()


def test_parquet_files_in_place_of_the_folders_give_the_same_samples(tmp_path: Path) -> None:
    data, flat = repository(tmp_path / "nlvr"), tmp_path / "flat"
    flat.mkdir()
    for split, parts in (("train", {"train": "1", "train_rest": "36"}), ("dev", {"dev": "1"})):
        for name, directory in parts.items():
            rows = [
                {"id": image.stem, "image": image.read_bytes(), "question": row["sentence"], "answer": row["label"]}
                | {"directory": row["directory"]}
                for row in map(json.loads, (data / split / f"{split}.json").read_text().splitlines())
                for image in sorted((data / split / "images").rglob(f"{split}-{row['identifier']}-*.png"))
                if row["directory"] == directory
            ]
            pq.write_table(pa.Table.from_pylist(rows), flat / f"{name}.parquet")
    for source in load_config(ROOT / "params.yaml", "nlvr").prepare.sources:
        read = [list(nlvr.read(source.model_copy(update={"path": at / source.path.name}))) for at in (data, flat)]
        assert read[0] == read[1] != []


def test_make_nlvr_makes_the_base_and_runs_the_profile_on_the_given_folder() -> None:
    make = ["make", "-n", "nlvr", "DATA=/some where/nlvr"]
    said = subprocess.run(make, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert "ln -s \"$(realpath '/some where/nlvr')\" data/nlvr" in said
    assert re.search(r"recipes\.tiny_vlm --wide --out runs/wide-vlm\n.*vismem repro --profile nlvr evaluate", said)


def test_the_large_profile_is_the_large_model_on_the_same_data() -> None:
    large, small = (load_config(ROOT / "params.yaml", name) for name in ("nlvr_7b", "nlvr"))
    assert large.base.model == load_config(ROOT / "params.yaml", "qwen2_5_vl_7b").base.model
    assert {s.path for s in large.prepare.sources} == {s.path for s in small.prepare.sources}
    assert not set(large.prepare.sources[0].directories) & set(large.prepare.sources[1].directories)


# --- the base ---------------------------------------------------------------------------------------------------------


def test_an_image_of_nlvr_becomes_a_hundred_visual_tokens(base: Path, backbone: Qwen25VLBackbone) -> None:
    found = encode(backbone, [Sample("", (picture(SHAPES),), "", "")]).visual.sum()
    assert found == 100
    processor = read_json(base / "processor_config.json")["image_processor"]
    assert processor["size"] == {"shortest_edge": PIXELS - 392, "longest_edge": PIXELS}


def test_the_same_seed_gives_the_same_base_also_where_it_was_killed_before_its_end(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("recipes.tiny_vlm.wide.fresh_score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_wide(tmp_path / "again", 0, SETTINGS, ORIGIN)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)  # no step is taken again
    again = train_wide(tmp_path / "again", 0, SETTINGS, ORIGIN)
    assert {**file_hashes(again), "vision.csv": "", "language.csv": ""} == {
        **file_hashes(base), "vision.csv": "", "language.csv": ""
    }  # fmt: skip


@pytest.mark.parametrize("answer", ["true", "false"])
def test_a_base_that_does_not_look_is_scored_as_chance(
    backbone: Qwen25VLBackbone, base: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(
        "recipes.tiny_vlm.scores.decode",
        lambda model, batch, policy, max_new_tokens: [SimpleNamespace(text=f"answer: {answer}")] * len(batch),
    )
    score = fresh_score(backbone, SETTINGS)
    assert score["score"] == 50
    assert f"Of {score['n']} true-or-false sentences" in (base / "README.md").read_text()


def test_questions_that_share_an_image_lose_what_the_product_s_own_prompts_lose(backbone: Qwen25VLBackbone) -> None:
    asked = [
        Sample("", (), "how many blue circles?", "2"),
        Sample("", (), "true or false: There is a box.", "true", rationale="1 1 1, 3."),
    ]
    images = [Sample("", (picture(scene),), "", "") for scene in (TOWERS, SHAPES)]
    with torch.no_grad():
        seen = encode(backbone, images)
    reading = Reading(backbone, seen.embeds[seen.visual], [asked, asked], images[0], 0, SETTINGS)
    for at in (0, 1):
        table, numbers = reading.lay_out(at, random.Random(0), strips=0)
        read = (numbers[None] == numbers[:, None]) | (numbers[None] == 0)
        with torch.no_grad():
            together = answer_loss(backbone, stack(backbone, reading.features, [table]), read[None])
            alone = sum(loss_of(backbone, dataclasses.replace(one, images=images[at].images)) for one in asked)
        assert float(together) == pytest.approx(float(alone), rel=1e-4)


def test_strips_are_shown_once_the_plain_steps_are_over(backbone: Qwen25VLBackbone) -> None:
    """First, or behind a delimiter of the answer."""
    asked = [[Sample("", (), f"how many blue circles {n}?", "2", rationale="1 1 0.") for n in range(20)]] * 2
    image = Sample("", (picture(SHAPES),), "", "")
    settings = dataclasses.replace(SETTINGS, plain=3, asked=20)
    reading = Reading(backbone, torch.zeros(200, backbone.width), asked, image, 0, settings)
    tables = [[table for table, _ in reading.collect(step)] for step in range(6)]
    shown = [[int((table[:, 0] > 0).sum()) for table in step] for step in tables]
    assert shown[:3] == [[100, 100]] * 3
    assert min(count for step in shown[3:] for count in step) > 100
    for table in (table for step in tables for table in step):
        images = {int(token - 1) // 100 for token in table[:, 0] if token > 0}
        assert len(images) == 1, "a strip is of the image that is asked about"
    before, line_break = Counter[str](), reading.line_break
    for table in (table for step in tables[3:] for table in step):
        starts = [at for at in range(2, len(table)) if table[at, 0] > 0 and table[at - 1, 1] == line_break]
        before.update(backbone.processor.tokenizer.decode(table[at - 2, 1]) for at in starts)
    assert set(before) == {"\n", ".", ":"}, "the prompt's end, the thought's and the mark's"


def loss_of(backbone: Qwen25VLBackbone, sample: Sample) -> float:
    """Summed cross-entropy of the reference answer after the prompt as the product writes it."""
    prompt, answer = (
        encode(backbone, [sample]),
        [*target_ids(backbone.processor.tokenizer, sample), backbone.processor.tokenizer.eos_token_id],
    )
    embeds = torch.cat([prompt.embeds, backbone.embedding(torch.tensor([answer]))], dim=1)
    following = (
        prompt.next_position()[:, :, None] + torch.arange(len(answer))
        if prompt.next_position().dim() == 2
        else prompt.next_position()[None, :, None] + torch.arange(len(answer))
    )
    positions = torch.cat([prompt.positions, following.expand(3, 1, -1)], dim=2)
    mask = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()[None, None]
    logits = backbone.head(backbone.language(embeds, positions, mask)[0, -len(answer) - 1 : -1])
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))


def test_each_token_says_what_stands_there(backbone: Qwen25VLBackbone) -> None:
    sight = Sight(backbone, [SHAPES], [], 0, SETTINGS)
    words, cells = sight.words, 2 * sight.target(SHAPES).view(5, 20, -1)
    assert not cells[0].any()
    circle = words["yellow"] + words["circle"] + words["yellow"] * words["circle"] / 0.3 + words["small"]
    torch.testing.assert_close(cells[1, 0], circle + words["left"])
    large = words["blue"] + words["triangle"] + words["blue"] * words["triangle"] / 0.3 + words["big"]
    torch.testing.assert_close(cells[4, 11], large + words["right"] + words["bottom"])


def test_a_tower_that_sees_no_shapes_loses_one(backbone: Qwen25VLBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    sight = Sight(
        backbone, [SHAPES, TOWERS], [Sample("", (picture(s),), "", "") for s in (SHAPES, TOWERS)], 0, SETTINGS
    )
    prompt = encode(backbone, sight.images)
    for step in (0, 1):  # before and after places are said
        embeds = torch.zeros_like(prompt.embeds, requires_grad=True)
        said = embeds.masked_scatter(prompt.visual[..., None], step * sight.places.repeat(2, 1))
        monkeypatch.setattr(
            "recipes.tiny_vlm.wide.encode", lambda *_, said=said: dataclasses.replace(prompt, embeds=said)
        )
        assert sight.backward(sight.collect(step)) == {"loss": pytest.approx(1.0)}


def test_a_picture_has_the_colours_and_places_of_nlvr() -> None:
    image = Image.open(io.BytesIO(picture(TOWERS))).convert("RGB")
    assert image.size == (400, 100)
    places = {(50, 90): (0, 0, 0), (50, 69): (0, 153, 255), (200, 90): (255, 255, 0), (125, 50): (128, 128, 128)}
    assert {at: image.getpixel(at) for at in places} == places
    assert image.getpixel((10, 10)) == image.getpixel((390, 10)) == (211, 211, 211)
