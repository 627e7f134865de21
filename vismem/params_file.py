"""Writes parameters as a `params.yaml` in which every key has its description from `vismem/config/` as a comment."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vismem.config import Config, Section
from vismem.config.section import is_rare

WIDTH = 120
HEADER = (
    "# All parameters of VisMem. A profile in deploy/profiles/ overlays them: `vismem repro --profile NAME`.\n"
    "# Types and bounds: vismem/config/. Written by `vismem params`, which shows seldom changed keys too with --all.\n"
)


def render_params(config: Config, every: bool = False) -> str:
    """The parameters as YAML text, each with its description as a comment; `load_config` reads it back unchanged.

    Keys that are `rare` and have their default are left out, unless `every` key is asked for.
    """
    return HEADER + "\n".join(_section(config, 0, every)) + "\n"


def _section(section: Section, depth: int, every: bool) -> Iterator[str]:
    """Lines of one section, indented by `depth` levels of two spaces."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{'  ' * depth}{field.alias or name}:"
        if is_rare(field) and value == field.default and not every:
            continue
        if isinstance(value, Section):
            if depth == 0:
                yield ""
                yield f"# {_first_line(value)}"
            yield key
            yield from _section(value, depth + 1, every)
        elif isinstance(value, tuple) and value and all(isinstance(item, Section) for item in value):
            yield key
            for item in value:
                indent = "  " * (depth + 1)
                first, *rest = _section(item, depth + 2, every)
                yield from _leaf(f"{indent}- {first.strip()}", _first_line(item), indent)
                yield from rest
        else:
            yield from _leaf(f"{key} {_flow(value)}", field.description, "  " * depth)


def _leaf(line: str, description: str | None, indent: str) -> Iterator[str]:
    """A key with its value; the comment stands beside it, or above it where the line would be too long."""
    if not description:
        yield line
    elif len(line) + len(description) + 4 <= WIDTH:
        yield f"{line}  # {description}"
    else:
        yield f"{indent}# {description}"
        yield line


def _flow(value: Any) -> str:
    """One value in YAML's flow style, on one line."""
    if isinstance(value, Path):
        value = value.as_posix()
    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.strip().removesuffix("...").strip()
    return text if "\n" not in text else json.dumps(value, ensure_ascii=False)  # JSON is YAML, always on one line


def _first_line(section: Section) -> str:
    return (type(section).__doc__ or "").strip().splitlines()[0]
