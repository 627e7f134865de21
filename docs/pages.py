"""Hooks of mkdocs: pages written from the code, and pages that lie beside what they describe.

Parameters and commands are written at every build, so they cannot be out of date.
"""

import argparse
import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic_core import to_jsonable_python

from vismem.cli import build_parser
from vismem.config import SOURCES, Config, Section

ROOT = Path(__file__).parents[1]
BESIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "assets/tiny-vlm/README.md",
    "assets/tiny-vlm-memory/README.md",
    "benchmarks/README.md",
    "data/README.md",
    "deploy/docker/README.md",
    "deploy/kubernetes/README.md",
    "deploy/triton/README.md",
)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and those that lie outside docs/."""
    for name in BESIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    files.append(File.generated(config, "parameters.md", content=parameters_page()))
    files.append(File.generated(config, "command-line.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages; a link to a file that the site does not have becomes its text."""
    source = page.file.src_uri
    here = PurePosixPath(source if source in BESIDE else f"docs/{source}").parent

    def point(match: re.Match[str]) -> str:
        text, link, anchor = match.groups(default="")
        target = os.path.normpath(here / link)
        if (ROOT / target).is_dir() and f"{target}/README.md" in BESIDE:
            target = f"{target}/README.md"
        if target == "params.yaml":
            target = "docs/parameters.md"
        name = target if target in BESIDE else target.removeprefix("docs/")
        if name == target and target not in BESIDE:
            return text
        return f"[{text}]({os.path.relpath(name, PurePosixPath(source).parent)}{anchor})"

    return LINK.sub(point, markdown) + (python_reference() if source == "python.md" else "")


def parameters_page() -> str:
    """Every parameter with its default and meaning, one table per section."""
    lines = [
        "# Parameters",
        "`params.yaml` holds them; a profile of `deploy/profiles/` overlays it. `vismem params --all` prints those",
        "in force. In brackets where a default comes from: [paper] is arXiv 2511.11007, [ours] a choice it leaves",
        "open, [measured] is explained under [Results](results/README.md).",
        "",
        *_table(Config()),
    ]
    for name, field in Config.by_key().items():
        if isinstance(field.default, Section):
            lines += _section(name, field.default)
    lines += ["## Sources", "The kinds of `prepare.sources`.", ""]
    for kind, source in SOURCES.items():
        lines += [f"### {kind}", source.__doc__ or "", "", *_table(source)]
    return "\n".join(lines)


def _section(name: str, section: Section) -> Iterator[str]:
    yield from (f"## {name}", (type(section).__doc__ or "").strip(), "", *_table(section))
    for key, value in section:
        if isinstance(value, Section):
            yield from _section(f"{name}.{key}", value)


def _table(section: Section | type[Section]) -> list[str]:
    """A Markdown table of the parameters that are no sections themselves."""
    kind = section if isinstance(section, type) else type(section)
    rows = []
    for key, field in kind.by_key().items():
        name = next(name for name, each in kind.model_fields.items() if each is field)
        default = getattr(section, name, "" if field.is_required() else field.default)
        if field.description:
            shown = "must be given" if field.is_required() else f"`{_plain(default)}`"
            rows.append(f"| `{key}` | {shown} | {field.description} |")
    return ["| parameter | default | meaning |", "|---|---|---|", *rows, ""] if rows else []


def _plain(value: Any) -> str:
    return json.dumps(to_jsonable_python(value), ensure_ascii=False)


def python_reference() -> str:
    """The public classes of the Python interface: signatures and docstrings, read without importing torch."""
    tree = ast.parse((ROOT / "vismem" / "inference.py").read_text())
    lines = ["", "## Reference"]
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        lines += [f"### {kind.name}", *_docstring(kind)]
        fields = [node for node in kind.body if isinstance(node, ast.AnnAssign)]
        lines += ["```python", *map(ast.unparse, fields), "```"] if fields else []
        for method in (node for node in kind.body if isinstance(node, ast.FunctionDef)):
            if not method.name.startswith("_"):
                result = f" -> {ast.unparse(method.returns)}" if method.returns else ""
                lines += [f"#### {kind.name}.{method.name}", "```python"]
                lines += [f"{method.name}({ast.unparse(method.args)}){result}", "```", *_docstring(method)]
    return "\n".join(lines)


def _docstring(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    return [ast.get_docstring(node) or "", ""]


def commands_page() -> str:
    """The help of the program and of every command."""
    parser = build_parser()
    commands = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["# Command line", "`vismem --help` and `vismem COMMAND --help` print the same.", "", *_help(parser)]
    for name, command in commands.items():
        lines += [f"## {name}", *_help(command)]
    return "\n".join(lines)


def _help(parser: argparse.ArgumentParser) -> list[str]:
    return ["```text", parser.format_help().rstrip(), "```", ""]
