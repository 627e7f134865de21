"""Small files of the paper's benchmarks in their published layouts, replies, and the scores worked out by hand."""

import base64
import csv
import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
SHADES = itertools.count(1)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 56), (shade % 256, 90, shade // 256)).save(file, "PNG")
    return file.getvalue()


def shown() -> str:
    """A picture as the files hold it; never the same one."""
    return base64.b64encode(png(next(SHADES))).decode()


def row(index: str, question: str, answer: str, image: str | None = None, **columns: str) -> dict[str, str]:
    return {"index": index, "image": shown() if image is None else image, "question": question, "answer": answer} | {
        name.replace("_", "-") if name == "l2_category" else name: value for name, value in columns.items()
    }


@dataclass
class Gold:
    """`replies`: per row vanilla's and VisMem's. `scores`: theirs, in percent. `first`: how the first question ends."""

    rows: list[dict[str, Any]]
    replies: list[tuple[str, str]]
    scores: tuple[float, float]
    first: str
    left_out: dict[str, int] = field(default_factory=dict)


FOUR = {"A": "green", "B": "red", "C": "blue", "D": "None"}
VISTA = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\nQuestion: "
)
FREE = "Hint: Please answer the question requiring a number and provide it at the end.\nQuestion: "
GOLD = {
    "MMStar": Gold(  # 2 and 3 of 4
        [
            row(str(n), "Which colour?", answer, **FOUR, category="coarse perception", l2_category="x")
            for n, answer in enumerate("CABD")
        ],
        [("C", "C"), ("The answer is B.", "A. green"), ("red", "(B)"), ("E", "E")],
        (50, 75),
        "D. None\nAnswer with the letter of the right option.",
    ),
    "MMVet": Gold(  # by the judge: (1/2 + 0) / 2 and (1 + 1) / 2
        [
            row("v1_0", "What is x?", "-1<AND>-5", category="ocr,math"),
            row("v1_1", "What?", "cat<OR>kitten", category="rec"),
        ],
        [("x = -1", "x is -1 or -5"), ("a dog", "a kitten")],
        (25, 100),
        "What is x?",
    ),
    "MMT-Bench_VAL": Gold(  # over questions: 3 of 4, though of the two tasks one is all wrong
        [
            row(str(n), "Which?", "A", **FOUR, category="abc" if n else "def", l2_category="OCR", split="VAL")
            for n in range(4)
        ],
        [("B", "A"), ("A", "A"), ("A", "A"), ("green", "A")],
        (75, 100),
        "D. None\nAnswer with the letter of the right option.",
    ),
    "BLINK": Gold(
        [
            row(n, "Which is darker?", "B", str([shown(), shown()]), A="the first", B="the second", category="Depth")
            for n in ("val_1", "val_2", "val_2")
        ],
        [("A", "B"), ("the second", "B"), ("the second", "B")],
        (50, 100),
        "<image><image>Which is darker?\nA. the first\nB. the second\nAnswer with the letter of the right option.",
        {"an index that is there before": 1},
    ),
    "MUIRBench": Gold(
        [
            row(str(n), "Is <image> like", "A", str([shown(), shown(), shown()]), A="<image>", B="<image>", task="m")
            for n in range(2)
        ],
        [("B", "A"), ("both", "B")],
        (0, 50),
        "Is <image> like\nA. <image>\nB. <image>\nAnswer with the letter of the right option.",
    ),
    "MMMU_DEV_VAL": Gold(  # of validation alone: 2 and 3 of 4
        [
            row("validation_Math_1", "In <image 1>, which?", "B", **FOUR, split="validation", category="Math"),
            row("validation_Math_2", "How much?", "6.5", split="validation", category="Math"),
            row("validation_Math_3", "How much?", """["Newton's", '3.429']""", split="validation", category="Math"),
            row("validation_Art_1", "Which?", "C", **FOUR, split="validation", category="Art"),
            row("dev_Art_1", "Which?", "A", **FOUR, split="dev", category="Art"),
        ],
        [("B", "B"), ("The answer is 6.5", "6.50"), ("3.4", "3.429"), ("A", "D"), ("A", "B")],
        (50, 75),
        "In <image>, which?\nA. green\nB. red\nC. blue\nD. None\nAnswer with the letter of the right option.",
        {"part dev": 1},
    ),
    "LogicVista": Gold(  # sets of letters: one more or fewer is wrong
        [
            row("1", "Which two follow? A. x B. y C. z", "A, C", skill="['inductive']"),
            row("2", "Which follows? A. x B. y C. z", "B", skill="['deductive']"),
            row("3", "Select from A, B, C and D.", "D", skill="['spatial']"),
        ],
        [("A", "A and C"), ("B", "b"), ("A, D", "The answer is D.")],
        (100 / 3, 100),
        "Which two follow? A. x B. y C. z",
    ),
    "MathVista_MINI": Gold(
        [
            row(
                "1", f"{VISTA}What fraction is blue?\nChoices:\n(A) 3/11\n(B) 8/11\n(C) 6/11", "8/11",
                question_type="multi_choice", answer_type="text", choices="['3/11', '8/11', '6/11']", answer_option="B",
            ),
            row(
                "5", f"{VISTA}Which is the root?\nChoices:\n(A) F\n(B) A\n(C) D", "A",
                question_type="multi_choice", answer_type="text", choices="['F', 'A', 'D']", answer_option="B",
            ),
            row("2", f"{FREE}Which number is missing?", "14", question_type="free_form", answer_type="integer"),
            row("3", f"{FREE}How much money? (Unit: $)", "1.45", question_type="free_form", answer_type="float"),
            row("4", f"{FREE}Between which years?", "[2007, 2008]", question_type="free_form", answer_type="list"),
        ],
        [("(A)", "(B) 8/11"), ("A", "B"), ("It is 14.", "14"), ("1.5", "$1.45"), ("[2008, 2007]", "[2007, 2008]")],
        (20, 100),
        "(B) 8/11\n(C) 6/11",
    ),
    "MV-MATH": Gold(  # by the judge; the file is what the page makes of its release
        [
            {
                "problem_id": 1, "question": "Which cannot be folded?\nA.\n\n<image_1>\nB.\n\n<image_2>",
                "input_image": ["b_1.jpg", "b_2.jpg"], "answer": "B", "answer_type": "choice", "subject": "Solids",
            },
            {
                "problem_id": 1110, "question": "The perimeter in <image_1> is $\\qquad$.",
                "input_image": ["b_3.jpg"], "answer": "15.6", "answer_type": "single-step", "subject": "Algebra",
            },
        ],
        [("Answer: {A}", "Answer: {B}"), ("15.6", "It is 15.6")],
        (50, 100),
        "Which cannot be folded?\nA.\n\n<image>\nB.\n\n<image>",
    ),
    "HallusionBench": Gold(  # aAcc 4/5, fAcc 2/3, qAcc 2/3; all
        [
            row(f"VD_math_1_0_{n}", "Is it?", "Yes" if n == "1_0" else "No", category="VD", l2_category="math")
            for n in ("1_0", "1_1", "2_0", "2_1")
        ]
        + [row("VS_map_1_0_1_0", "Is it?", "Yes"), row("VS_map_0_0_0_0", "Is it?", "Yes", image="")],
        [("Yes.", "yes"), ("No", "no"), ("No, it is not.", "no"), ("Yes", "no"), ("Yes", "yes"), ("", "")],
        ((80 + 400 / 3) / 3, 100),
        "Is it?\nAnswer yes or no.",
        {"no image": 1},
    ),
}  # fmt: skip


def write_release(folder: Path) -> None:
    """MV-MATH as its repository has it, and its images."""
    (folder / "MV-MATH" / "data").mkdir(parents=True)
    (folder / "MV-MATH" / "data" / "MV-MATH.json").write_text(json.dumps(GOLD["MV-MATH"].rows))
    (folder / "images" / "MV-MATH").mkdir(parents=True)
    for place, image in enumerate(image for one in GOLD["MV-MATH"].rows for image in one["input_image"]):
        (folder / "images" / "MV-MATH" / image).write_bytes(png(40_000 + place))


def write_files(folder: Path) -> Path:
    """The benchmarks' files, as VLMEvalKit lays them out; MV-MATH's by the program of docs/evaluation.md."""
    for name, gold in GOLD.items():
        if name != "MV-MATH":
            with (folder / f"{name}.tsv").open("w", newline="") as lines:
                columns = list(dict.fromkeys(column for one in gold.rows for column in one))
                table = csv.DictWriter(lines, columns, delimiter="\t", restval="")
                table.writeheader()
                table.writerows(gold.rows)
    write_release(folder)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    return folder


REPLIES = {
    f"{name}-{one.get('index', one.get('problem_id'))}": dict(zip(("vanilla", "vismem"), replies, strict=True))
    for name, gold in GOLD.items()
    for one, replies in zip(gold.rows, gold.replies, strict=True)
}
