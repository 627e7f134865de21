"""Your own questions as JSON lines: one object per line, images as paths inside the file's folder.

Needed: `id`, `image` or `images` or `videos`, `prompt`, `answer`. Optional: `choices`, `rationale`, `task`,
`capability`. Other keys are ignored. Bytes are taken as they are: whether they decode is for `validate` to judge.

A video is `{"frames": FOLDER or [FILE, ...], "fps": NUMBER}`: frames that were cut out of it before, a folder's files
in the order of their names. Video files (MP4 and the like) are not decoded here.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from vismem.config import JsonlSource
from vismem.data.readers.inside import inside
from vismem.data.sample import Capability, Sample, Video
from vismem.errors import UserError

NEEDED = ("id", "prompt", "answer")


def read(source: JsonlSource, split: str, seed: int) -> Iterator[Sample]:
    """Yield the file's questions in order if `split` is the source's; at most `source.limit`.

    Raises UserError, naming file and line, for a missing file or image, an image outside the file's folder,
    broken JSON, and a missing or mistyped key.
    """
    if split == source.split:
        yield from islice(_rows(source.path), source.limit)


def _rows(path: Path) -> Iterator[Sample]:
    if not path.is_file():
        raise UserError(f"no JSONL file {path}: check `path` in prepare.sources (paths start at the working folder)")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _sample(line, path, f"{path}, line {number}")


def _sample(line: bytes, path: Path, where: str) -> Sample:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}): save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg} at column {error.colno}): one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: an object {{...}} is needed, not a {type(row).__name__}")
    missing = [key for key in NEEDED if key not in row]
    if not {"image", "images", "videos"} & set(row):
        missing.append("image")
    if missing:
        raise UserError(
            f"{where}: no {_names(missing)}; the line has {_names(row) or 'no keys'}. "
            f"Needed: id, image (or images or videos), prompt, answer"
        )
    return Sample(
        id=_text(row, "id", where),
        images=tuple(_image(path.parent, name, where) for name in _image_names(row, where)),
        question=_text(row, "prompt", where),
        answer=_text(row, "answer", where),
        choices=tuple(_list(row, "choices", where)),
        rationale=_text(row, "rationale", where),
        task=_text(row, "task", where) or "vqa",
        capability=_capability(row, where),
        source=f"jsonl:{path.name}",
        videos=tuple(_video(value, path.parent, where) for value in _list(row, "videos", where, dict)),
    )


def _image_names(row: dict[str, Any], where: str) -> list[str]:
    if "image" in row and "images" in row:
        raise UserError(f"{where}: has both 'image' and 'images': keep one")
    key = "image" if "image" in row else "images"
    return [row[key]] if isinstance(row.get(key), str) else _list(row, key, where)


def _video(value: dict[str, Any], folder: Path, where: str) -> Video:
    names, fps = value.get("frames"), value.get("fps")
    if not isinstance(names, str | list) or isinstance(fps, bool) or not isinstance(fps, int | float):
        raise UserError(
            f'{where}: a video is {{"frames": a folder or a list of files, "fps": their number per second}}, '
            f"got {json.dumps(value)[:60]}"
        )
    if isinstance(names, list):
        return Video(tuple(_image(folder, name, where) for name in _list(value, "frames", where)), float(fps))
    clip = inside(folder, folder / names, where)
    if not clip.is_dir():
        raise UserError(
            f"{where}: no folder {folder / names} of a video's frames; a video file must be cut into frames first, "
            f"for instance with: ffmpeg -i clip.mp4 -vf fps={fps:g} {Path(names).stem}/%05d.png"
        )
    files = sorted(file for file in clip.iterdir() if not file.name.startswith("."))
    return Video(tuple(_image(folder, file, where) for file in files), float(fps))


def _image(folder: Path, name: str | Path, where: str) -> bytes:
    file = inside(folder, folder / name, where)
    if not file.is_file():
        raise UserError(f"{where}: no image file {folder / name}: paths are relative to the folder of the .jsonl file")
    return file.read_bytes()


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: '{key}' must be a string, got {json.dumps(value)[:60]}")
    return str(value)


def _list(row: dict[str, Any], key: str, where: str, kind: type = str) -> list[Any]:
    values = row.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        needed = "strings" if kind is str else "objects {...}"
        raise UserError(f"{where}: '{key}' must be a list of {needed}, got {json.dumps(values)[:60]}")
    return values


def _capability(row: dict[str, Any], where: str) -> Capability:
    known = [capability.value for capability in Capability]
    name = row.get("capability", Capability.UNDERSTANDING)
    if name not in known:
        raise UserError(f"{where}: capability {json.dumps(name)} is not one of {', '.join(known)}")
    return Capability(name)


def _names(keys: Any) -> str:
    return ", ".join(f"'{key}'" for key in keys)
