"""Your own questions as JSON lines: one object per line, images as paths inside the file's folder, or the source's.

An image may also be a data URI of base64. Where a prompt holds `<image>` once per image, each stands there.

Needed: `id`, `image` or `images` or `videos`, `prompt`, `answer`. Optional: `choices`, `rationale`, `task`,
`capability`, `group` (a cluster, see `vismem.data.clusters`). Other keys are ignored. Bytes are taken as they are:
whether they decode is for `validate` to judge.

A video is `{"frames": FOLDER or [FILE, ...], "fps": NUMBER}`: frames that were cut out of it before, a folder's files
in the order of their names. Video files (MP4 and the like) are not decoded here.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vismem.config import JsonlSource
from vismem.data.readers.files import inside, json_lines, json_object, numbered_lines
from vismem.data.sample import Capability, Sample, Video
from vismem.errors import UserError
from vismem.runtime.images import DATA_URI, decoded_base64, url_fault

NEEDED = ("id", "image or images or videos", "prompt", "answer")


def read(source: JsonlSource) -> Iterator[Sample]:
    """Yield the file's questions in order.

    Raises UserError, naming file and line, for a missing file or image, an image outside the folder of images,
    broken JSON, and a missing or mistyped key.
    """
    path, folder = source.path, source.images or source.path.parent
    if not path.is_file():
        raise UserError(f"no JSONL file {path}: check `path` in prepare.sources; the kind dvc fetches what is not here")
    for where, row in json_lines(path, NEEDED):
        yield sample_of(row, folder, where, f"jsonl:{path.name}")


def named_files(source: JsonlSource) -> set[Path]:
    """The images, and the files or folders of frames, that its rows name; what is wrong with a row `read` says."""
    folder, found = source.images or source.path.parent, set[Path]()
    for where, line in numbered_lines(source.path) if source.path.is_file() else ():
        with suppress(UserError):
            row = json_object(line, where, ())
            frames = [video.get("frames") for video in _list(row, "videos", where, dict)]
            names = _image_names(row, where) + [n for f in frames for n in (f if isinstance(f, list) else [f])]
            places = [folder / str(name) for name in names if not str(name).startswith(DATA_URI)]
            found |= {place for place in places if inside(folder, place, where)}
    return found


def sample_of(row: dict[str, Any], folder: Path, where: str, source: str) -> Sample:
    """The sample that one line's object describes; its images are in `folder`. UserError as from `read`.

    A key whose value is null counts as left out.
    """
    row = {key: value for key, value in row.items() if value is not None}
    capability, known = row.get("capability", Capability.UNDERSTANDING), [str(known) for known in Capability]
    _require(capability in known, where, f"'capability' must be one of {', '.join(known)}", capability)
    return Sample(
        id=_text(row, "id", where),
        images=tuple(_image(folder, name, where) for name in _image_names(row, where)),
        question=_text(row, "prompt", where),
        answer=_text(row, "answer", where),
        choices=tuple(_list(row, "choices", where)),
        rationale=_text(row, "rationale", where),
        task=_text(row, "task", where) or "vqa",
        capability=Capability(capability),
        source=source,
        cluster=_text(row, "group", where),
        videos=tuple(_video(value, folder, where) for value in _list(row, "videos", where, dict)),
    )


def _image_names(row: dict[str, Any], where: str) -> list[str]:
    if "image" in row and "images" in row:
        raise UserError(f"{where}: has both 'image' and 'images': keep one")
    key = "image" if "image" in row else "images"
    return [row[key]] if isinstance(row.get(key), str) else _list(row, key, where)


def _video(value: dict[str, Any], folder: Path, where: str) -> Video:
    names, fps = value.get("frames"), value.get("fps")
    typed = isinstance(names, str | list) and isinstance(fps, int | float) and not isinstance(fps, bool)
    what = '{"frames": a folder or a list of files, "fps": their number per second}'
    _require(typed, where, f"a video is {what}", value)
    files: list[Any] = _list(value, "frames", where) if isinstance(names, list) else []
    if isinstance(names, str):
        clip = inside(folder, folder / names, where)
        if not clip.is_dir():
            raise UserError(
                f"{where}: no folder {folder / names} of a video's frames; a video file must be cut into frames first, "
                f"for instance with: ffmpeg -i clip.mp4 -vf fps={fps:g} {Path(names).stem}/%05d.png"
            )
        files = sorted(file for file in clip.iterdir() if not file.name.startswith("."))
    return Video(tuple(_image(folder, file, where) for file in files), float(value["fps"]))


def _image(folder: Path, name: str | Path, where: str) -> bytes:
    if str(name).startswith(DATA_URI):
        try:
            return decoded_base64(str(name))
        except ValueError as error:
            raise UserError(f"{where}: an image is no base64: {error}") from None
    if fault := url_fault(str(name)):
        raise UserError(f"{where}: {fault}")
    file = inside(folder, folder / name, where)
    try:
        return file.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        start = "paths start at the .jsonl file's folder, or where --images (of a source `images`) says"
        raise UserError(f"{where}: no image file {folder / name}: {start}") from None
    except OSError as error:
        raise UserError(f"{where}: {str(name)[:200]}: {error.strerror}") from None


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key, "")
    typed = isinstance(value, str | int | float) and not isinstance(value, bool)
    known = not (isinstance(value, float) and math.isnan(value))  # as pandas writes what is not there
    _require(typed and known, where, f"'{key}' must be a string", value)
    return str(value)


def _list(row: dict[str, Any], key: str, where: str, kind: type = str) -> list[Any]:
    values = row.get(key) or []
    typed = isinstance(values, list) and all(isinstance(value, kind) for value in values)
    _require(typed, where, f"'{key}' must be a list of {'strings' if kind is str else 'objects {...}'}", values)
    return values


def _require(typed: bool, where: str, must: str, value: Any) -> None:
    if not typed:
        raise UserError(f"{where}: {must}, got {json.dumps(value)[:60]}")
