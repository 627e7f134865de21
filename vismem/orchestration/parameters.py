"""Which parameters a task gets: no more than can change what it makes, so that a cache of tasks stays right."""

import hashlib
import os
from pathlib import Path
from typing import Any

import vismem
from vismem.config import Config, JsonlSource, LmuDataSource, NlvrSource, without_nulls
from vismem.provenance import sha256_folder
from vismem.steps import BY_NAME

IDENTITY = "made_from"  # no section: what else the output depends on
RELEASE = ("gate", "registry", "deploy", "study", "preflight")  # what happens around a model, never to it
PREFLIGHT = ("preflight", "base", "registry")


def parameters_of(name: str, config: Config) -> dict[str, Any]:
    """The sections for the task `name`, as plain values: a step's own and those of all steps before it.

    The earlier ones are free: whatever they change reaches the step through its inputs in any case. `export` and
    `register` write down how the model was made, `register` with the rules by which it was judged. For a step,
    `IDENTITY` names the code, and for `prepare` the files of its sources: a cache that knows only parameters and
    inputs then makes anew what other code or other data would make otherwise.
    """
    values: dict[str, Any] = without_nulls(config.model_dump(mode="json", by_alias=True))
    if name == "preflight":
        return {section: values[section] for section in PREFLIGHT}
    if name == "export":
        values = {section: value for section, value in values.items() if section not in RELEASE}
    elif name != "register":
        values = {section: value for section, value in values.items() if section in _sections(name)}
    identity = {"code": sha256_folder(Path(vismem.__file__).parent, "**/*.[pj][y2]")}
    if name == "prepare":
        identity["sources"] = sources_fingerprint(config)
    return {**values, IDENTITY: identity}


def sources_fingerprint(config: Config) -> str:
    """Hex sha256 over names, sizes and times of the files that the sources read; they are not opened.

    A source that is generated or comes in a package has no files of its own. Missing files are `prepare`'s to report.
    """
    lines: list[str] = []
    for source in config.prepare.sources:
        if isinstance(source, JsonlSource):
            folder = source.path.parent  # its images lie beside it
        elif isinstance(source, NlvrSource):
            folder = source.path
        elif isinstance(source, LmuDataSource):
            folder = source.path or Path(os.environ.get("LMUData", "."))  # noqa: SIM112 - VLMEvalKit's name
        else:
            continue
        files = sorted(path for path in (folder, *folder.rglob("*")) if path.is_file())
        lines += [f"{path.as_posix()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sections(name: str) -> set[str]:
    step = BY_NAME[name]
    return set(step.sections).union(*(_sections(earlier) for earlier in step.inputs))
