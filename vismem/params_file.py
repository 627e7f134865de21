"""Writes parameters as a `params.yaml` in which every key has its description from `vismem/config/` as a comment."""

import json
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

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
    return HEADER + "\n".join(_lines(config, "", every)) + "\n"


def _lines(section: Section, indent: str, every: bool) -> Iterator[str]:
    """The lines of a section's keys."""
    for name, field in type(section).model_fields.items():
        value, line = getattr(section, name), f"{indent}{field.alias or name}:"
        if is_rare(field) and value == field.default and not every:
            continue
        if isinstance(value, Section):
            if not indent:
                yield ""
            yield from _commented(line, _title(value), indent)
            yield from _lines(value, f"{indent}  ", every)
        elif name == "sources" and value:
            yield line
            for source in value:
                first, *rest = _lines(source, f"{indent}    ", every)
                yield from _commented(f"{indent}  - {first.strip()}", _title(source), f"{indent}  ")
                yield from rest
        else:
            yield from _commented(f"{line} {_flow(value)}", field.description, indent)


def _commented(line: str, description: str | None, indent: str) -> Iterator[str]:
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
    plain = to_jsonable_python(value)
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.strip().removesuffix("...").strip()
    return text if "\n" not in text else json.dumps(plain, ensure_ascii=False)  # JSON is YAML, always on one line


def _title(section: Section) -> str:
    return (type(section).__doc__ or "").strip().splitlines()[0]
