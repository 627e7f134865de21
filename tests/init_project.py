"""A project in which `vismem init` is run on a user's photographs, and what it printed."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from vismem.cli import main

ROOT = Path(__file__).parents[1]
Lines = list[dict[str, object] | str]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, with a user's photographs in a folder beside it; the user stands in the project."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "deploy" / "profiles", root / "deploy" / "profiles")
    shutil.copy(ROOT / "params.yaml", root)
    (root / "data").mkdir()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(root)
    return root


def picture(path: Path, number: int, size: tuple[int, int] = (84, 84)) -> None:
    image = Image.new("RGB", size, (245, 245, 240))
    image.putpixel((number % size[0], number // size[0]), (215, 35, 40))
    image.save(path)


def question(number: int, **changes: object) -> dict[str, object]:
    line = {"id": str(number), "image": f"{number}.png", "prompt": "where is the red circle?", "answer": "top left"}
    return {key: value for key, value in {**line, **changes}.items() if value is not None}


def write(
    folder: Path, count: int = 12, more: Sequence[dict[str, object] | str] = (), name: str = "mine.jsonl"
) -> Path:
    """A file of `count` good questions about as many images, and of `more`."""
    for number in range(count):
        picture(folder / f"{number}.png", number)
    lines = [question(number) for number in range(count)] + list(more)
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.fixture
def run(project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `vismem init` and return what it printed, also where it failed."""

    def run(*arguments: object, status: int = 0) -> str:
        assert main(["init", *map(str, arguments)]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run
