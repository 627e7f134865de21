"""The profile that `vismem init` writes: computed from rows and base, explained, and read back."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from vismem.cli import main
from vismem.config import Config, load_config, parse_config
from vismem.config.data import Split
from vismem.data.sample import Sample
from vismem.init.bases import Base, look_at
from vismem.init.profile import settings_of
from vismem.init.rows import Row

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny-vlm"


def rows(train: int, test: int, rationale: str = "") -> dict[Split, list[Row]]:
    one = Row("line 1", {}, None, Sample("1", (), "?", "top left", rationale=rationale), (b"1",), ((84, 84),))
    return {"train": [one] * train, "validation": [one] * 5, "test": [one] * test}


def values(base: Base, config: Config, train: int = 42, test: int = 12, **changed: str) -> dict[str, object]:
    found = settings_of("own", base, rows(train, test, **changed), config, Path("data/raw"), 0)
    return {setting.key: setting.value for setting in found}


@pytest.fixture
def tiny() -> Base:
    return look_at(parse_config({"base": {"model": str(TINY)}}).base)


def test_steps_grow_with_the_rows_up_to_the_defaults(tiny: Base) -> None:
    config = Config()
    few, some, many = (values(tiny, config, train) for train in (42, 1000, 100_000))
    keys = ("stage1.warm_start.steps", "stage1.steps", "stage2.steps")
    default = (config.stage1.warm_start.steps, config.stage1.steps, config.stage2.steps)
    assert tuple(few[key] for key in keys) == (10, 5, 5)
    assert some["stage1.warm_start.steps"] == 250
    assert tuple(many[key] for key in keys) == default
    passes = parse_config({"stage1": {"steps": 0}, "stage2": {"steps": 0}})  # 0: so many as `grpo.epochs` says
    assert tuple(values(tiny, passes)[key] for key in keys) == (10, 5, 5)


@pytest.mark.parametrize(("test", "needed"), [(12, 200), (200, 200), (1000, 950)])
def test_the_gate_asks_for_nearly_all_test_questions_and_never_for_fewer_than_the_default(
    tiny: Base, test: int, needed: int
) -> None:
    assert values(tiny, Config(), test=test)["gate.min_items"] == needed


def test_the_longest_answer_in_the_base_s_tokens_fits(tiny: Base) -> None:
    long = "red " * 190
    count = tiny.longest([f"{long} answer: top left"])
    assert count > 190
    assert count < values(tiny, Config(), rationale=long)["grpo.max_new_tokens"] < count + 16  # type: ignore[operator]
    assert values(tiny, Config())["evaluate.max_new_tokens"] == Config().evaluate.max_new_tokens


def test_without_a_tokenizer_lengths_are_rather_too_long(tiny: Base) -> None:
    text = "middle row: empty, red circle, empty answer: red circle"
    assert Base("org/name", small=False).longest([text]) > tiny.longest([text])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "deploy" / "profiles", tmp_path / "deploy" / "profiles")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def written(capsys: pytest.CaptureFixture[str], *more: str, status: int = 0) -> tuple[str, str]:
    """The profile's text and what was said."""
    assert main(["init", "own", "--data", "examples/questions.jsonl", *more]) == status
    printed = capsys.readouterr()
    profile = Path("deploy/profiles/own.yaml")
    return profile.read_text() if profile.is_file() else "", printed.out + printed.err


def test_every_key_is_explained_and_has_names_of_its_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, said = written(capsys)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for before, line in pairwise(lines):
        if line == "sources:" or not (line.startswith(("#", "-")) or line.endswith(":")):
            assert before.startswith("#"), line
    config = load_config(project / "params.yaml", "own")
    names = (config.registry.model_name, config.registry.experiment, config.deploy.model_name)
    assert names == ("vismem-own", "vismem-own", "vismem_own")
    assert "on two CPU cores" in said
    assert "min_items" in said, "20 questions are too few, and it says so"


def test_a_large_base_gets_the_paper_s_settings_and_no_time_is_promised(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = written(capsys, "--base", "Qwen/Qwen2.5-VL-7B-Instruct")
    config, paper = (load_config(project / "params.yaml", name) for name in ("own", "qwen2_5_vl_7b"))
    assert (config.stage1, config.stage2, config.memory) == (paper.stage1, paper.stage2, paper.memory)
    assert (config.base, config.preflight) == (paper.base, paper.preflight)
    assert "cannot be looked at" in said, "there is no hub here"
    assert "plan --profile own --gpus 8xH100` says what fits" in said
    assert yaml.safe_load(text)["extends"] == "qwen2_5_vl_7b"


def fake(folder: Path, **settings: object) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}, **settings}))
    return folder.name


@pytest.mark.parametrize(
    ("make", "graphs"),
    [
        (lambda root: fake(root / "tower", model_type="internvl", hidden_size=4096), False),
        (lambda root: str(TINY), True),
    ],
)
def test_a_family_without_graphs_is_exported_without(
    project: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], str], graphs: bool
) -> None:
    text, printed = written(capsys, "--base", make(project))
    assert "repro --profile own\n" in printed
    assert ("graphs: false" not in text) is graphs


def test_what_is_no_vision_language_model_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "text").mkdir()
    (project / "text" / "config.json").write_text('{"model_type": "qwen2"}')
    assert "has no vision" in written(capsys, "--base", "text", status=1)[1]
    other = written(capsys, "--base", fake(project / "other", model_type="internvl_chat"), status=1)[1]
    assert "model family 'internvl_chat' is not supported; supported: internvl, llava_onevision, qwen2_5_vl" in other
    assert "take the repository of the same name that ends in -HF or -hf" in other
    assert "--base takes a model's folder or a hub id" in written(capsys, "--base", "/gone/base", status=1)[1]
    assert "--base takes a model's folder or a hub id" in written(capsys, "--base", "no//id", status=1)[1]


def test_what_the_base_cannot_read_is_said_with_the_first_row(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (1024, 768), (90, 90, 90)).save(project / "photo.png")
    lines = [{"image": "photo.png", "prompt": word, "answer": "yes"} for word in ("is it open?", "which one?")]
    (project / "photos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, said = written(capsys, "--data", "photos.jsonl")
    assert "the base cannot read 2 of 22 questions. photos.jsonl, line 1: the tiny VLM was trained on" in said
    assert "unknown words: 'open'" in said
    assert "too large" not in said, "once is enough"
    assert "repro --profile own\n" in said


def test_a_base_that_can_read_no_question_at_all_is_not_to_be_trained(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(12):
        Image.new("RGB", (1024, 768), (90, 90, n)).save(project / f"{n}.png")
    lines = [{"image": f"{n}.png", "prompt": "is it open?", "answer": "yes"} for n in range(12)]
    (project / "photos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["init", "photos", "--data", "photos.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "the base cannot read 12 of 12 questions" in said
    assert said.splitlines()[-1].endswith("choose another model with `--base`, and `--force`")
    assert "repro" not in said


def test_pictures_that_the_base_shrinks_are_counted() -> None:
    processor = SimpleNamespace(
        do_resize=True, patch_size=14, merge_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 1000 * 1000}
    )
    base = Base("org/name", small=False, processor=processor)
    sides = ((2000, 1000), (500, 500), (20, 20))
    (large, small) = base.resized(
        [replace(one, sides=(size,)) for one, size in zip(rows(3, 0)["train"], sides, strict=True)]
    )
    assert large.startswith("1 of 3 images are too large for the base")
    assert large.endswith("they are shrunk, one of 2000 x 1000 to 1400 x 700")
    assert small.endswith("they are enlarged, one of 20 x 20 to 56 x 56")


def test_a_large_base_is_told_how_to_answer_what_the_rows_ask_and_the_tiny_one_is_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, _ = written(capsys, "--base", "Qwen/Qwen2.5-VL-7B-Instruct")
    made, paper = (load_config(project / "params.yaml", name).prepare for name in ("own", "qwen2_5_vl_7b"))
    assert made.instructions == paper.instructions
    kinds = yaml.safe_load(text)["prepare"]["instructions"]
    assert set(kinds) == {"choice", "yes_no", "text"}
    assert "of your questions are answered so" in text
    assert "instructions" not in yaml.safe_load(written(capsys, "--force")[0])["prepare"]
