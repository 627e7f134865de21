"""`vismem ask` and `vismem try`: a trained model in this process, no server, no parameter file."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from vismem.config import JsonlSource
from vismem.data.readers.jsonl import read
from vismem.data.sample import Sample
from vismem.evaluation.answers import score
from vismem.files import read_json
from vismem.inference import VisMem
from vismem.serving.exchange import Answer, Token, check_seed
from vismem.shipped import shipped

DEFAULT_MODEL = "assets/tiny-vlm-memory"  # comes with VisMem
EXAMPLES = "examples/questions.jsonl"
FIRST = "images/01.png"
MARKS = {1.0: "[green]✓[/]", 0.0: "[red]✗[/]"}  # by score
NEXT = (  # of the program, the first picture and its question
    ("{} repro", "train, test, release and serve such a model, as `make demo` does: minutes on 2 cores"),
    ('{} ask --image {} "{}"', "ask about a picture; --model names a model of your own"),
    ("{} init NAME --data FILE", "start with your own questions"),
)


def ask(
    images: Sequence[str],
    question: str,
    model: str = DEFAULT_MODEL,
    base: str | None = None,
    *,
    dtype: str | None = None,
    seed: int = 0,
    stream: bool = False,
    write: Callable[[str], None] = partial(print, end="", flush=True),  # noqa: B008
    **request: Any,
) -> None:
    """Write the answer with its memories marked, and a line's end; with `stream` piece by piece.

    `request`: what `VisMem.answer` takes beside images and question. UserError as it and `from_pretrained` raise it.
    """
    check_seed(seed)
    disable_progress_bar()
    loaded = VisMem.from_pretrained(model, None, dtype, base)  # type: ignore[arg-type]  # the command's choices
    request |= {"images": images, "question": question, "seed": seed}
    pieces: Iterable[Token | Answer] = loaded.stream(**request) if stream else [loaded.answer(**request)]
    for piece in pieces:
        write(piece.marked)
    write("\n")


def try_examples(console: Console, program: str) -> None:
    """Answer the examples that come with VisMem, with memory and without; print both beside the references.

    `program` is what the caller types for `vismem`.
    """
    disable_progress_bar()
    samples = examples()
    model = VisMem.from_pretrained(DEFAULT_MODEL)
    questions = [(sample.images, sample.question) for sample in samples]
    arms = [model.answers(questions, memory=memory) for memory in (True, False)]
    folder = shipped(EXAMPLES).parent
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    about = f"The {len(samples)} questions of {shown}; ⟨short⟩ and ⟨long⟩ stand where a memory was invoked"
    console.print(escape(about), example_table(samples, *arms), score_line(samples, *arms), "", sep="\n")
    console.print("Next:")
    for command, about in NEXT:
        console.print(
            f"  {about}",
            f"    [bold]{escape(command.format(program, shown / FIRST, samples[0].question))}[/]",
            sep="\n",
            soft_wrap=True,
        )


def examples() -> list[Sample]:
    """The examples that come with VisMem, in order."""
    return list(read(JsonlSource(kind="jsonl", path=shipped(EXAMPLES), split="test")))


def example_table(samples: Sequence[Sample], with_memory: Sequence[Answer], without: Sequence[Answer]) -> Table:
    """One row per question: its image, both answers with what they are worth, and the reference."""
    table = Table("image", "question", "answer with memory", "answer without", "right is")
    for sample, *answers in zip(samples, with_memory, without, strict=True):
        cells = [f"{MARKS[score(sample, answer)]} {escape(answer.marked)}" for answer in answers]
        table.add_row(sample.id, escape(sample.question), *cells, escape(sample.answer), end_section=True)
    return table


def score_line(samples: Sequence[Sample], with_memory: Sequence[Answer], without: Sequence[Answer]) -> str:
    """How many answers are right, and what that is worth."""
    right, plain = (
        int(sum(score(sample, answer) for sample, answer in zip(samples, answers, strict=True)))
        for answers in (with_memory, without)
    )
    measured = read_json(shipped(DEFAULT_MODEL) / "training.json")
    scores = {arm: f"{percent:.1f} %" for arm, percent in measured["scores"].items()}
    return (
        f"Right: {right} of {len(samples)} with memory, {plain} without. {len(samples)} questions prove nothing: on "
        f"{measured['questions']:,} it was {scores['vismem']} with and {scores['vanilla']} without, and `make demo` "
        "measures it again."
    )
