"""Writes and verifies a Triton model repository: configuration, the Python model, a part of the library, the bundle.

The repository names no path outside itself, so that it can be renamed, synced to a bucket or mounted elsewhere. Each
model has a manifest of all its files; `MANIFEST_VARIABLE` pins the hash of that manifest.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vismem.errors import UserError
from vismem.files import link_or_copy, read_json, write_json
from vismem.provenance import MANIFEST, file_hashes, sha256_file, sha256_folder, verify_manifest, write_manifest
from vismem.runtime.access import TOKEN_VARIABLE, own_token
from vismem.shipped import shipped

MODEL_SOURCE, UNARY_SOURCE = shipped("deploy/triton/model.py"), shipped("deploy/triton/unary.py")
LIBRARY = Path(__file__).parents[1]
SERVED = (  # of the library, what lies beside a served bundle: nothing of it imports torch
    "generation/invocation.py",
    "generation/loop.py",
    "generation/onnx_executor.py",
    "generation/slots.py",
    "generation/types.py",
    "models/kinds.py",
    "models/tokens.py",
    "runtime/*.py",
    "serving/answering.py",
    "serving/golden.py",
    "serving/metrics.py",
    "serving/pieces.py",
    "serving/request_log.py",
    "serving/served.py",
)
SERVED_UNARY = ("runtime/access.py",)  # beside NAME_unary, which holds no bundle
MANIFEST_VARIABLE = "VISMEM_MANIFEST_SHA256"
UNARY = "unary"  # in a manifest: the hash of the manifest of NAME_unary

CONFIG = """\
# Written by VisMem. A request holds one question; a response holds pieces of the answer.
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
# Off on purpose: Triton's cache would ignore request parameters and outlive a reload.
response_cache {{ enable: false }}
# Requests wait here while all workers are busy: beyond this number they are refused, after 30 s they time out.
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: 32
    timeout_action: REJECT
    default_timeout_microseconds: 30000000
    allow_timeout_override: true  # a client may shorten its own wait
  }}
}}
input [
  {{ name: "IMAGE", data_type: TYPE_STRING, dims: [ -1 ] }},  # encoded image files, in the prompt's order
  {{ name: "PROMPT", data_type: TYPE_STRING, dims: [ 1 ], optional: true }},  # the question, UTF-8
  {{ name: "MESSAGES", data_type: TYPE_STRING, dims: [ 1 ], optional: true }},  # in its place: a conversation, JSON
  {{ name: "MAX_NEW_TOKENS", data_type: TYPE_INT32, dims: [ 1 ], optional: true }},  # the evaluation's
  {{ name: "TEMPERATURE", data_type: TYPE_FP32, dims: [ 1 ], optional: true }},  # 0: greedy
  {{ name: "SEED", data_type: TYPE_INT64, dims: [ 1 ], optional: true }},  # 0
  {{ name: "MEMORY", data_type: TYPE_STRING, dims: [ 1 ], optional: true }},  # learned; off, short, long
  {{ name: "STREAM", data_type: TYPE_BOOL, dims: [ 1 ], optional: true }},  # true; false: one response with every piece
  {{ name: "STOP", data_type: TYPE_STRING, dims: [ -1 ], optional: true }}  # texts before which the answer ends
]
output [
  {{ name: "TEXT", data_type: TYPE_STRING, dims: [ -1 ] }},
  {{ name: "EVENT", data_type: TYPE_STRING, dims: [ -1 ] }},  # token, short, long, end
  {{ name: "USAGE", data_type: TYPE_STRING, dims: [ -1 ] }}  # of the end: JSON
]
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
version_policy {{ latest {{ num_versions: 1 }} }}
"""


def write_model_repository(bundle: Path, repository: Path, name: str, version: int, *, library: Path = LIBRARY) -> Path:
    """Write `repository/name/version` for an exported bundle, and return `repository/name`.

    Layout: `config.pbtxt`; `manifest.json`; `VERSION/model.py`, `VERSION/vismem/`, `VERSION/bundle/`
    (hard links where the file system allows, else copies). Other versions already there are kept. Beside it stands
    `repository/name_unary`, for clients without streams. Raises UserError for a name or version that Triton would not
    take, and for a bundle that is missing, has no graphs or is not as its manifest says.
    """
    if version < 1:
        raise UserError(f"model version {version}: Triton takes whole numbers from 1")
    if problems := verify_manifest(bundle):
        raise UserError(f"{bundle} is not what was exported: {'; '.join(problems)}; run `vismem export` again")
    if not has_graphs(bundle):
        raise UserError(without_graphs(bundle))
    model = repository / name
    folder, unary = _write_code(repository, name, version, library)
    own = file_hashes(folder)
    shutil.copytree(bundle, folder / "bundle", copy_function=link_or_copy)
    bundled = read_json(bundle / MANIFEST)["files"] | {MANIFEST: sha256_file(bundle / MANIFEST)}
    own |= {f"bundle/{file}": value for file, value in bundled.items()}
    others = read_json(model / MANIFEST)["files"] if (model / MANIFEST).exists() else {}
    files = {file: value for file, value in others.items() if not file.startswith(f"{version}/")}
    files |= {f"{version}/{file}": value for file, value in own.items()}
    files["config.pbtxt"] = sha256_file(model / "config.pbtxt")
    write_json(model / MANIFEST, {"files": dict(sorted(files.items())), UNARY: sha256_file(unary)})
    return model


def _write_code(repository: Path, name: str, version: int, library: Path = LIBRARY) -> tuple[Path, Path]:
    """Write all of a repository but the bundle; return the version's folder and the manifest of NAME_unary."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or is_unary(name):
        raise UserError(
            f"deploy.model_name '{name}': use letters, digits, '_', '-' and '.' only, no '_unary' at the end"
        )
    model = repository / name
    folder = model / str(version)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = CONFIG.format(name=name)
    (model / "config.pbtxt").write_text(config)
    _write_python(MODEL_SOURCE, folder)
    copy_library(folder, library)
    return folder, _write_unary(repository / unary_name(name), config, library)


def code_hash(name: str) -> str:
    """Hex sha256 of what this VisMem writes beside a bundle of that model."""
    with TemporaryDirectory() as folder:
        _write_code(Path(folder), name, 1)
        return sha256_folder(Path(folder))


def has_own_code(repository: Path, name: str, version: str) -> bool:
    """Whether an undamaged repository holds, beside that version's bundle, just what this VisMem writes."""
    with TemporaryDirectory() as folder:
        _, unary = _write_code(Path(folder), name, int(version))
        own, own_unary = file_hashes(Path(folder) / name), sha256_file(unary)
        models = {path.name for path in Path(folder).iterdir()}
    listed = read_json(repository / name / MANIFEST)
    code = {file: value for file, value in listed["files"].items() if not file.startswith(f"{version}/bundle/")}
    return (code, listed.get(UNARY)) == (own, own_unary) and models == {path.name for path in repository.iterdir()}


def has_graphs(bundle: Path) -> bool:
    """Whether a bundle was exported with ONNX graphs, which are what Triton serves."""
    return (bundle / "onnx").is_dir()


def without_graphs(bundle: Path) -> str:
    """What is said where a bundle has none."""
    return (
        f"{bundle} has no ONNX graphs for Triton: `vismem api --model {bundle}` serves it, or "
        "`vismem api --model models:/NAME@champion` where it is released"
    )


def unary_name(name: str) -> str:
    """The model that answers in one response what `name` answers in many."""
    return f"{name}_unary"


def is_unary(name: str) -> bool:
    """Whether a model is one of those."""
    return name != streaming_name(name)


def streaming_name(name: str) -> str:
    """NAME of NAME_unary, and of NAME itself."""
    return name.removesuffix(unary_name(""))


def _write_unary(model: Path, config: str, library: Path) -> Path:
    """Write NAME_unary with NAME's configuration but without its streams; return the path of its manifest."""
    shutil.rmtree(model, ignore_errors=True)
    (model / "1").mkdir(parents=True)
    lines = [line for line in config.splitlines() if not re.search('"(STREAM|EVENT)"|^#', line)]
    changed = "\n".join(lines).replace("_policy { decoupled: true }", "_policy { decoupled: false }")
    (model / "config.pbtxt").write_text(re.sub('^name: "(.*)"', rf'name: "{model.name}"', changed, flags=re.M) + "\n")
    _write_python(UNARY_SOURCE, model / "1")
    copy_library(model / "1", library, SERVED_UNARY)
    return write_manifest(model)


def _write_python(source: Path, folder: Path) -> None:
    """Copy `model.py`. Python writes no bytecode where `__pycache__` is a file; Triton would see a changed model."""
    shutil.copyfile(source, folder / "model.py")
    (folder / "__pycache__").touch()


def copy_library(folder: Path, library: Path = LIBRARY, served: Sequence[str] = SERVED) -> None:
    """Write `folder`/vismem with the files of `served`."""
    for file in (path for pattern in served for path in sorted(library.glob(pattern))):
        place = folder / "vismem" / file.relative_to(library)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        for package in place.relative_to(folder).parents[:-1]:
            (folder / package / "__init__.py").touch()


def repository_problems(repository: Path) -> list[str]:
    """What differs in `repository` from what was written, one line each; empty where every file is as it was."""
    models = sorted(path for path in repository.iterdir() if path.is_dir())
    problems = [f"{model.name}: {problem}" for model in models for problem in verify_manifest(model)]
    if problems:
        return problems
    for model in models:
        expected, by = os.environ.get(MANIFEST_VARIABLE), MANIFEST_VARIABLE
        if is_unary(model.name):
            beside = model.with_name(streaming_name(model.name)) / MANIFEST
            expected, by = read_json(beside).get(UNARY, "none") if beside.is_file() else "none", str(beside)
        if expected and sha256_file(model / MANIFEST) != expected:
            problems.append(f"{model.name}: {MANIFEST} is not the one that {by} names")
    return problems


def check_repository(repository: Path) -> None:
    """UserError with every problem where the files of `repository` are not those that were written.

    And where a token is asked for, of a version that was written before servers had one: it would answer everyone.
    """
    if problems := repository_problems(repository):
        raise UserError(f"{repository} is damaged: {'; '.join(problems)}; run `vismem deploy` or publish it again")
    versions = [path for path in repository.glob("*/[1-9]*") if not is_unary(path.parent.name)] if own_token() else []
    for version in versions:
        if not (version / "vismem/runtime/access.py").is_file():
            hint = f"run `vismem deploy`, on a cluster the job `rollout`, again, or unset {TOKEN_VARIABLE}"
            raise UserError(f"{version} was written by an earlier VisMem and knows no token: {hint}")
