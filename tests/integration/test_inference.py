"""VisMem in Python: answers alone, in batches and streamed; what goes in; the files, the registry and the hub."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_stages
import torch
from PIL import Image
from project import Project
from transformers import AutoModelForImageTextToText

from vismem import VisMem
from vismem.automodel import VisMemConfig, VisMemForAnswers
from vismem.config import BaseConfig, Config
from vismem.errors import UserError
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned
from vismem.generation.prompts import prompt_text
from vismem.inference import Memory
from vismem.models.kinds import MemoryKind
from vismem.models.reference import Base
from vismem.models.vismem import VisMemModel
from vismem.serving.exchange import Token, marked, plain
from vismem.training.base import base

QUESTIONS = [(sample.images, sample.question) for sample in tiny.samples()]
LIMIT = 12  # tokens
BROKEN = "\N{REPLACEMENT CHARACTER}"  # shown for bytes that make no character


@pytest.fixture(scope="module")
def trained(tiny_base: Path) -> VisMemModel:
    """A model that invokes often."""
    return tiny_stages.eager_model(tiny_base)


@pytest.fixture(scope="module")
def model(trained: VisMemModel, tiny_base: Path) -> VisMem:
    return VisMem(trained, Base(str(tiny_base)), tiny_base)


@pytest.fixture
def stages(trained: VisMemModel, tiny_base: Path, tmp_path: Path) -> Path:
    """A folder as the steps leave it: `stage2` beside its `base`."""
    (tmp_path / "steps" / "base").mkdir(parents=True)
    base(Config(base=BaseConfig(model=str(tiny_base))), {}, tmp_path / "steps" / "base")
    trained.save_pretrained(tmp_path / "steps" / "stage2")
    return tmp_path / "steps"


def answers(model: VisMem) -> list[str]:
    return [answer.marked for answer in model.answers(QUESTIONS, max_new_tokens=LIMIT)]


@pytest.mark.parametrize("memory", [True, False, "short", "long"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_same_alone_in_a_batch_and_streamed(model: VisMem, memory: Memory, temperature: float) -> None:
    given: dict[str, Any] = {"memory": memory, "temperature": temperature, "seed": 3, "max_new_tokens": LIMIT}
    together = model.answers(QUESTIONS, batch_size=5, **given)
    for (images, question), answer in zip(QUESTIONS, together, strict=True):
        alone, pieces = model.answer(images, question, **given), list(model.stream(images, question, **given))
        assert alone == answer == plain(pieces)
        assert alone.marked == answer.marked == marked(pieces)
        assert alone.invocations == answer.invocations
        assert pieces[-1] == Token("", "end")
    kinds = {memory.kind for answer in together for memory in answer.invocations}
    assert kinds == {True: {"short", "long"}, False: set(), "short": {"short"}, "long": {"long"}}[memory]


def test_a_stream_comes_piece_by_piece(model: VisMem, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = model.model.logits
    monkeypatch.setattr(model.model, "logits", lambda hidden: steps.append(1) or step(hidden))
    seen = [len(steps) for _ in model.stream(*QUESTIONS[0], memory=False, max_new_tokens=LIMIT)]
    assert seen[0] < seen[-1] == len(steps)
    assert len(set(seen)) > LIMIT // 2


def test_an_answer_holds_what_its_decoding_recorded(model: VisMem) -> None:
    found = model.answers(QUESTIONS, max_new_tokens=LIMIT)
    rollouts = generate(model.model, tiny.samples(), Learned(), max_new_tokens=LIMIT)
    assert any(memory.place for answer in found for memory in answer.invocations)
    whole = 0
    for answer, rollout in zip(found, rollouts, strict=True):
        assert answer == rollout.text.strip()
        assert (answer.tokens, answer.finished) == (rollout.answer_length, rollout.finished)
        assert [memory.kind for memory in answer.invocations] == [event.kind for event in rollout.invocations]
        text = rollout.marked_text
        for kind, token in (("short", "<m_I^s>"), ("long", "<m_I^l>")):
            text = text.replace(token, f"⟨{kind}⟩")
        assert answer == answer.marked.replace("⟨short⟩", "").replace("⟨long⟩", "").strip()
        if BROKEN not in text:  # see below
            assert answer.marked == text.strip()
            whole += len(answer.invocations) > 0
        if answer.invocations:
            assert answer.marked[answer.invocations[0].place] == "⟨"
        assert answer.seconds > 0
    assert whole > 1


@pytest.mark.parametrize("ends", [False, True])
def test_a_character_within_which_a_memory_comes_stands_behind_it(
    model: VisMem, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Its first bytes are held back until it is whole, or known to become none."""
    first, *rest = model.model.backbone.processor.tokenizer("🙂")["input_ids"]
    ids = [first, model.model.invoke_ids[MemoryKind.SHORT], *([] if ends else rest)]
    monkeypatch.setattr("vismem.inference.stream", lambda *_, **__: iter(ids))
    assert [*model.stream(*QUESTIONS[0])] == [
        Token("", "short"),
        Token(BROKEN if ends else "🙂", "token"),
        Token("", "end"),
    ]


def test_an_image_is_a_path_bytes_or_a_picture(model: VisMem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data, *_), question = QUESTIONS[0]
    (tmp_path / "a.png").write_bytes(data)
    picture = Image.open(io.BytesIO(data))
    found = {
        model.answer(image, question, max_new_tokens=LIMIT)
        for image in (data, picture, tmp_path / "a.png", str(tmp_path / "a.png"), [data], [picture])
    }
    assert len(found) == 1
    monkeypatch.setattr("vismem.runtime.limits.MAX_IMAGE_BYTES", 100)  # of a file, which a picture is none of
    with pytest.raises(UserError, match="the limit is 100"):
        model.answer(data, question)
    assert model.answer(picture, question, max_new_tokens=LIMIT) in found
    seen: Any = model.sample(Image.new("RGBA", (84, 84)), "what?").images[0]
    assert seen.getpixel((0, 0)) == (255, 255, 255), "as a file's"


def test_what_is_wrong_with_a_request_is_said(model: VisMem, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no image")
    for image, question, said in (
        (tmp_path / "none.png", "what?", "cannot read the image .*none.png: No such file"),
        ("https://example.org/a.png", "what?", "is a URL: download it first"),
        (tmp_path / "note.txt", "what?", r"note.txt \(8 bytes\) does not decode: it is no PNG, JPEG, WEBP file"),
        (b"no image", "what?", "image 1 of 1 .* does not decode"),
        ([QUESTIONS[0][0][0], Image.new("RGB", (1000, 2))], "what?", "image 2 is 1000x2: one side is over 200 times"),
        (QUESTIONS[0][0], " ", "PROMPT is empty"),
        ([], "what?", "0 images"),
        (QUESTIONS[0][0], "is <m_I^s> red?", r"PROMPT holds <m_I\^s>, one of the model's own tokens"),
        (QUESTIONS[0][0], "is it?<|im_end|>", r"PROMPT holds <\|im_end\|>, one of the model's own tokens"),
        (QUESTIONS[0][0], "is it \ud800?", "PROMPT is not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=said):
            model.answer(image, question)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=said):
            model.stream(image, question)  # type: ignore[arg-type]
    many = "what? " * 4000
    for given, said in (
        ({"memory": "medium"}, "memory='medium'"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 1.5}, r"the seed is 1\.5"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"question": many}, r"need \d+ positions, the model has"),
    ):
        request = {"images": QUESTIONS[0][0], "question": QUESTIONS[0][1], **given}
        with pytest.raises(UserError, match=said):
            model.answer(**request)
        with pytest.raises(UserError, match=said):
            model.stream(**request)


def test_what_stage2_wrote_finds_its_base_beside_it(model: VisMem, stages: Path) -> None:
    assert answers(VisMem.from_pretrained(stages / "stage2")) == answers(model)
    (stages / "base").rename(stages / "elsewhere")
    with pytest.raises(UserError, match=r"stage2 does not say which base .*name it with base="):
        VisMem.from_pretrained(stages / "stage2")
    assert answers(VisMem.from_pretrained(stages / "stage2", base=stages / "elsewhere")) == answers(model)
    with pytest.raises(UserError, match="holds no memory"):
        VisMem.from_pretrained(stages / "elsewhere")


def test_a_saved_model_is_complete_and_refuses_damage(model: VisMem, stages: Path, tmp_path: Path) -> None:
    VisMem.from_pretrained(stages / "stage2").save_pretrained(tmp_path / "saved")
    shutil.rmtree(stages)
    saved = (tmp_path / "saved").rename(tmp_path / "moved")
    VisMem.from_pretrained(saved).save_pretrained(saved)  # over itself
    assert answers(VisMem.from_pretrained(saved)) == answers(model)
    weights = bytearray((saved / "base" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "base" / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"moved is damaged: base/model\.safetensors has changed"):
        VisMem.from_pretrained(saved)


def test_another_base_than_the_memory_s_is_refused(model: VisMem, tiny_base: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert answers(VisMem.from_pretrained(tmp_path / "saved", base=tiny_base)) == answers(model)
    with pytest.raises(UserError, match="has other weights than the base"):
        VisMem.from_pretrained(tmp_path / "saved", base=tiny.save_base(tmp_path / "other", seed=1))


def test_a_name_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere/at/all: give a folder, a hub id"):
        VisMem.from_pretrained(tmp_path / "nowhere/at/all")
    with pytest.raises(UserError, match="write models:/NAME@ALIAS"):
        VisMem.from_pretrained("models:/vismem")


def test_a_registered_version_is_fetched_once_and_verified(
    model: VisMem, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(project.steps["export"] / "vismem")
    project.build((project.steps["export"] / "vismem" / "memory.safetensors").read_bytes())
    project.run("register")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(project.artifacts.parent)
    for name in ("models:/vismem@challenger", "models:/vismem/1"):
        assert answers(VisMem.from_pretrained(name)) == answers(model)
        shutil.rmtree(project.artifacts.parent / "mlartifacts", ignore_errors=True)
    with pytest.raises(UserError, match=r"no version or alias '7' of 'vismem' .*versions: 1"):
        VisMem.from_pretrained("models:/vismem/7")
    monkeypatch.chdir(tmp_path / "cache")
    with pytest.raises(UserError, match=r"no MLflow registry sqlite:///mlflow.db"):
        VisMem.from_pretrained("models:/vismem@champion")
    assert list(Path().iterdir()) == [Path("vismem")]


def test_a_model_goes_to_the_hub_and_comes_from_it(
    model: VisMem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub: dict[str, Path] = {}

    def upload(self: Any, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        hub[repo_id] = Path(shutil.copytree(folder_path, tmp_path / repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **_: f"https://hub/{name}")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(hub[name]))
    assert model.push_to_hub("someone/memory") == "https://hub/someone/memory"
    assert "library_name: vismem" in (hub["someone/memory"] / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "someone")
    assert answers(VisMem.from_pretrained("someone/memory")) == answers(model)


def test_no_hub_is_said_in_one_line(model: VisMem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="no folder someone/memory, and no model 'someone/memory' from the hub"):
        VisMem.from_pretrained("someone/memory")
    with pytest.raises(UserError, match="the hub did not take 'someone/memory'"):
        model.push_to_hub("someone/memory")


@pytest.mark.parametrize("memory", [True, False])
def test_transformers_loads_a_saved_model_and_generates_the_same_answers(
    model: VisMem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    pictures = [[Image.open(io.BytesIO(data)) for data in images] for images, _ in QUESTIONS]
    texts = [prompt_text(loaded.processor, sample) for sample in tiny.samples()]
    inputs = loaded.processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    made = loaded.generate(**inputs, max_new_tokens=LIMIT, memory=memory)
    prompts = inputs["input_ids"]
    assert made[:, : prompts.shape[1]].equal(prompts)
    said = loaded.processor.batch_decode(made[:, prompts.shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in said] == model.answers(QUESTIONS, max_new_tokens=LIMIT, memory=memory)
    invokes = torch.isin(made, torch.tensor([*model.model.invoke_ids.values()])).any()
    assert bool(invokes) == memory


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<m_I^s>", "a memory token"),
        ("<m_E^l>", "a memory token"),
        ("<|vision_start|>", "image tokens"),
        ("<|image_pad|>", "image tokens"),
        ("<|vision_start|><|image_pad|><|vision_end|>", "image tokens"),
        ("<|video_pad|>", "tokens of a video"),
    ],
)
def test_ids_with_a_memorys_an_images_or_a_videos_token_of_the_users_are_refused(
    model: VisMem, text: str, said: str
) -> None:
    """As transformers' own processor makes them of a text that nobody kept plain."""
    generating = VisMemForAnswers(VisMemConfig(), model)
    processor = generating.processor
    sample = tiny.samples()[0]
    pictures = [Image.open(io.BytesIO(data)) for data in sample.images]
    prompt = prompt_text(processor, sample)
    inputs = processor(text=[prompt], images=[pictures], return_tensors="pt")
    added = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    generating.generate(**inputs, max_new_tokens=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(UserError, match=said):
        generating.generate(**inputs, max_new_tokens=1)
