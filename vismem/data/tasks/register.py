"""The list of tasks: who builds a task's puzzles, which capability of the paper it is of, and what it needs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from vismem.data.sample import Capability
from vismem.data.tasks.layouts import Puzzle, World

Builder = Callable[[World], Puzzle | None]
Need = Literal["coarse", "detail", "compute"]

BUILDERS: dict[str, Builder] = {}
TASKS: dict[str, Capability] = {}
NEEDS: dict[str, Need] = {}


def task(need: Need, capability: Capability, *wordings: str) -> Callable[[Builder], Builder]:
    """Register a builder under its function's name. Its puzzle's question is one of the wordings, filled in.

    `need` is what an answer takes: the coarse prompt is enough ("coarse"), what only the whole picture shows
    ("detail"), or several steps of thought of which the answer writes none ("compute").
    """

    def register(build: Builder) -> Builder:
        def ask(world: World) -> Puzzle | None:
            puzzle = build(world)
            return puzzle and replace(puzzle, question=world.rng.choice(wordings).format(*puzzle.blanks))

        name = build.__name__
        BUILDERS[name], TASKS[name], NEEDS[name] = ask, capability, need
        return build

    return register
