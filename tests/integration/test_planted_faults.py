"""Faults that data sets have, each planted in clean data: the check that must name it, or why none can."""

import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from prepared import encoded, good, shards

from vismem.config import BaseConfig, ValidateConfig
from vismem.data.sample import Sample, Video
from vismem.models.small_files import read_tokenizer
from vismem.runtime.reserved import Reserved
from vismem.validation.findings import Findings
from vismem.validation.validate import examine

Splits = dict[str, list[Sample]]
AT = 11  # the row of the train split that most faults are planted in
SIDE = (96, 96)


@dataclass(frozen=True)
class Fault:
    """What is planted, and the checks that must name it: all of them and no other."""

    name: str
    plant: Callable[[Splits], None]
    checks: str = ""  # "": a known miss
    files: Callable[[Path], None] = lambda folder: None  # planted in the train split's shards
    why_missed: str = ""


def clean() -> Splits:
    """20 rows a split, the images of each row its own."""
    splits = {split: [good(split, number) for number in range(20)] for split in ("train", "validation", "test")}
    offset = {"train": 1000, "validation": 2000, "test": 3000}
    return {
        split: [
            dataclasses.replace(row, images=(encoded(offset[split] + n, SIDE),), question=f"Which letter is in {n}?")
            for n, row in enumerate(rows)
        ]
        for split, rows in splits.items()
    }


def saved(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(row: Sample) -> Image.Image:
    return Image.open(io.BytesIO(row.images[0])).convert("RGB")


def blank(mode: str, colour: object) -> bytes:
    return saved(Image.new(mode, SIDE, colour))  # type: ignore[arg-type]


def noise(size: tuple[int, int], spread: float = 90) -> Image.Image:
    return Image.effect_noise(size, spread).convert("RGB")


def animation() -> bytes:
    file, frames = io.BytesIO(), [noise(SIDE) for _ in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def row(**fields: object) -> Callable[[Splits], None]:
    """One row of the train split with other fields."""

    def plant(splits: Splits) -> None:
        splits["train"][AT] = dataclasses.replace(splits["train"][AT], **fields)  # type: ignore[arg-type]

    return plant


def image(*data: bytes) -> Callable[[Splits], None]:
    return row(images=data)


def added(split: str, source: str, **fields: object) -> Callable[[Splits], None]:
    """A row of `source` once more in `split`, under another id, changed by functions of it."""

    def plant(splits: Splits) -> None:
        old = splits[source][5]
        made = {name: value(old) if callable(value) else value for name, value in fields.items()}
        splits[split].append(dataclasses.replace(old, id="added", **made))

    return plant


def redrawn(change: Callable[[Image.Image], Image.Image], kind: str = "PNG", **options: int) -> object:
    return lambda old: (saved(change(picture(old)), kind, **options),)


def group(splits: Splits) -> None:
    """Rows of a patient in two splits, from two files; another kind of source has such a name, too."""
    for split, at, source in (("train", AT, "jsonl:a"), ("test", 5, "jsonl:b"), ("validation", 5, "nlvr")):
        splits[split][at] = dataclasses.replace(splits[split][at], source=source, cluster="patient 7")


def every(split: str, **fields: object) -> Callable[[Splits], None]:
    def plant(splits: Splits) -> None:
        splits[split] = [dataclasses.replace(row, **fields) for row in splits[split]]  # type: ignore[arg-type]

    return plant


def first(split: str, count: int, **fields: object) -> Callable[[Splits], None]:
    def plant(splits: Splits) -> None:
        splits[split][:count] = [dataclasses.replace(row, **fields) for row in splits[split][:count]]  # type: ignore[arg-type]

    return plant


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "part-00000.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return plant


def cut(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-200])


def same(image: Image.Image) -> Image.Image:
    return image


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


def larger(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 17 // 10, image.height * 17 // 10))


def nothing(splits: Splits) -> None:
    pass


def tenth(splits: Splits) -> None:
    for split in splits:
        first(split, 2, question="")(splits)


def lose(splits: Splits) -> None:
    del splits["test"][8:]
    first("test", 2, question="")(splits)


NEAR = "near_duplicates"
FAULTS = (
    # ids and fields
    Fault("an empty id", row(id=" "), "ids_filled"),
    Fault("an id twice in a split", row(id="train-3"), "ids_unique"),
    Fault("an id in two splits", row(id="test-3"), "ids_unique"),
    Fault("a null question", row(question=None), "fields_filled question_length"),
    Fault("a null source", row(source=None), "fields_filled"),
    Fault("an unknown capability", row(capability="seeing"), "capability_known"),
    # images
    Fault("no image", row(images=()), "images_present"),
    Fault("a video", row(videos=(Video((encoded(1),), 2.0),)), "no_videos"),
    Fault("an empty file", image(b""), "images_decode"),
    Fault("a truncated PNG", image(encoded(9, SIDE)[:200]), "images_decode"),
    Fault("a truncated JPEG", image(saved(noise(SIDE), "JPEG")[:900]), "images_decode"),
    Fault("an error page in the place of an image", image(b"<html>404 Not Found</html>"), "images_decode"),
    Fault("an animation", image(animation()), "images_decode"),
    Fault("an image of 20 pixels", image(encoded(9, (20, 40))), "image_min_side"),
    Fault("an image of 5000 pixels", image(encoded(9, (5000, 120))), "image_max_side"),
    Fault("a strip", image(encoded(9, (3000, 40))), "image_aspect"),
    Fault("a white image", image(blank("RGB", "white")), "images_not_blank"),
    Fault("a transparent image", image(blank("RGBA", (9, 9, 9, 0))), "images_not_blank"),
    Fault("an almost black image", image(saved(noise(SIDE, 1).point(lambda v: min(v // 60, 3)))), "images_not_blank"),
    Fault("two marks for one image", row(question="Is <image> as <image>?"), "marks_match"),
    Fault("one mark for two images",
          row(question="Is <image> so?", images=(encoded(8, SIDE), encoded(9, SIDE))), "marks_match"),
    # answers and options
    Fault("an empty answer", row(answer="", choices=()), "answers_filled"),
    Fault("an answer of spaces", row(answer=" \n", choices=()), "answers_filled"),
    Fault("a missing value written as an answer", row(answer="NaN", choices=()), "answers_meant"),
    Fault("a page as an answer", row(answer="so " * 2000, choices=()), "answer_length"),
    Fault("an answer that is no choice", row(answer="c"), "answers_among_choices"),
    Fault("a letter behind the last choice",
          row(answer="C", choices=("red", "blue"), question="A. red B. blue"), "answers_among_choices"),
    Fault("two equal choices", row(answer="b", choices=("a", "b", "a")), "choices_distinct"),
    Fault("choices that differ in case only", row(answer="b", choices=("Hat", "b", "hat ")), "choices_distinct"),
    Fault("a single choice", row(answer="a", choices=("a",)), "choices_distinct"),
    # texts
    Fault("an empty question", row(question=""), "question_length"),
    Fault("a book as a question", row(question="why " * 1500), "question_length"),
    Fault("a token of the base in a question", row(question="Is it <|im_end|>?"), "texts_plain"),
    Fault("a memory token in a rationale", row(rationale="so <m_I^s>"), "texts_plain"),
    Fault("another model's template", row(question="[INST] Which? [/INST]"), "texts_without_markup"),
    Fault("HTML entities", row(question="Is a &lt; b &amp; c?"), "texts_without_markup"),
    Fault("HTML tags", row(rationale="first<br/>second"), "texts_without_markup"),
    Fault("UTF-8 read as Windows-1252", row(question="Where is the cafÃ©?"), "texts_readable"),
    Fault("the same in a choice", row(answer="b", choices=("naÃ¯ve", "b")), "texts_readable"),
    Fault("lost characters", row(question="Where is the caf\ufffd?"), "texts_readable"),
    Fault("a null byte", row(rationale="so\x00"), "texts_readable"),
    Fault("text that is turned around", row(question="Is it \u202egpj.exe?"), "texts_readable"),
    # duplicates and contradictions
    Fault("a row twice", added("train", "train"), "rows_distinct"),
    Fault("the same question answered otherwise", added("train", "train", answer="a"), "answers_agree"),
    Fault("the same in another file format",
          added("train", "train", answer="a", images=redrawn(same, "WEBP", lossless=True)), "answers_agree"),
    # splits
    Fault("an image of test in train", added("train", "test", question="Other?"), "no_leakage"),
    Fault("an image of validation in train", added("train", "validation", question="Other?"), "no_leakage"),
    Fault("the same in another file format",
          added("train", "test", question="Other?", images=redrawn(same, "WEBP", lossless=True)), "no_leakage"),
    Fault("a patient of test in train", group, "no_leakage"),
    Fault("an image of test in train, as JPEG",
          added("train", "test", question="Other?", images=redrawn(same, "JPEG", quality=60)), NEAR),
    Fault("an image of test in train, at half the size",
          added("train", "test", question="Other?", images=redrawn(half)), NEAR),
    Fault("an image of test in validation, larger and as JPEG",
          added("validation", "test", question="Other?", images=redrawn(larger, "JPEG", quality=75)), NEAR),
    Fault("an image of test in train, mirrored",
          added("train", "test", question="Other?", images=redrawn(ImageOps.mirror)), NEAR),
    Fault("an image of test in train, turned by a quarter",
          added("train", "test", question="Other?", images=redrawn(lambda i: i.rotate(90))), NEAR),
    Fault("a question of test in train, its image as JPEG",
          added("train", "test", images=redrawn(same, "JPEG", quality=75)), f"questions_unseen {NEAR}"),
    Fault("an empty test split", lambda splits: splits["test"].clear(), "non_empty_splits"),
    Fault("a test split of eight that loses two", lose, "split_loss question_length"),
    Fault("a tenth of bad rows", tenth, "quarantined_share question_length"),
    Fault("one answer for all", every("train", answer="a"), "label_balance"),
    Fault("a task of test only", every("test", task="find"), "task_drift"),
    # shards
    Fault("a missing column", nothing, "schema", rewritten(lambda table: table.drop_columns(["answer"]))),
    Fault("an unknown column", nothing, "schema",
          rewritten(lambda table: table.append_column("label", pa.array(range(len(table)))))),
    Fault("answers that are numbers", nothing, "schema",
          rewritten(lambda table: table.set_column(3, "answer", pa.array(range(len(table)))))),
    Fault("a truncated shard", nothing, "schema", cut),
    # known misses
    Fault("a wrong answer", row(answer="a"), why_missed="only who sees the image knows"),
    Fault("the image of another question",
          lambda splits: first("train", 1, images=splits["train"].pop(1).images)(splits),
          why_missed="only who sees the image knows"),
    Fault("an image twice in a row", image(encoded(9, SIDE), encoded(9, SIDE, "WEBP", lossless=True)),
          why_missed="'are they the same?' is a sound question"),
    Fault("an image of test in train, cropped",
          added("train", "test", question="Other?", images=redrawn(lambda i: i.crop((24, 24, 96, 96)))),
          why_missed="the small copies compare whole images"),
    Fault("an answer that the question gives away", row(question="Is it b, as b is right?"),
          why_missed="many sound questions name their answer: 'is it red or blue?'"),
)  # fmt: skip


STOPS = {"schema", "non_empty_splits", "no_leakage", "quarantined_share", "split_loss"}
WARNS = {
    *("near_duplicates", "images_not_blank", "answers_meant", "choices_distinct", "texts_without_markup"),
    *("rows_distinct", "label_balance", "task_drift"),
}  # and all others set rows apart


def found(fault: Fault, folder: Path) -> Findings:
    splits = clean()
    fault.plant(splits)
    shards(folder, **splits)
    fault.files(folder / "prepare" / "train")
    reserved = Reserved(read_tokenizer(BaseConfig()), ("<m_I^s>",))
    return examine(ValidateConfig(), folder / "prepare", reserved, folder)


def broken(findings: Findings) -> set[str]:
    return {verdict.rule.name for verdict in findings.verdicts if not verdict.success}


def test_clean_data_breaks_no_rule(tmp_path: Path) -> None:
    assert broken(found(Fault("none", nothing), tmp_path)) == set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_named_by_its_check_and_by_no_other(fault: Fault, tmp_path: Path) -> None:
    findings, checks = found(fault, tmp_path), set(fault.checks.split())
    assert broken(findings) == checks
    assert {line.partition(":")[0] for line in findings.errors} == checks & STOPS
    assert set(findings.warnings) == checks & WARNS
    assert bool(findings.reasons) == bool(checks - STOPS - WARNS)
    assert bool(fault.checks) != bool(fault.why_missed), "a miss has its reason"
