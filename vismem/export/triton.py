"""Writes a Triton model repository: configuration, the thin Python model, the runtime package and the bundle.

The repository names no path outside itself, so that it can be renamed, synced to a bucket or mounted elsewhere.
"""

import os
import re
import shutil
from pathlib import Path

import vismem
from vismem.errors import UserError
from vismem.provenance import verify_manifest

PACKAGE = Path(vismem.__file__).parent
MODEL_SOURCE = PACKAGE.parent / "deploy" / "triton" / "model.py"
RUNTIME = PACKAGE / "serving" / "runtime"

CONFIG = """\
# Written by VisMem. A request holds one question; each response holds one piece of the answer.
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
# Off on purpose: Triton's cache would ignore request parameters and outlive a reload.
response_cache {{ enable: false }}
input [
  {{ name: "IMAGE", data_type: TYPE_STRING, dims: [ -1 ] }},  # encoded image files (PNG, JPEG), in the prompt's order
  {{ name: "PROMPT", data_type: TYPE_STRING, dims: [ 1 ] }},  # the question, UTF-8
  {{ name: "MAX_NEW_TOKENS", data_type: TYPE_INT32, dims: [ 1 ], optional: true }},  # 48
  {{ name: "TEMPERATURE", data_type: TYPE_FP32, dims: [ 1 ], optional: true }},  # 0: greedy
  {{ name: "SEED", data_type: TYPE_INT64, dims: [ 1 ], optional: true }},  # 0
  {{ name: "MEMORY", data_type: TYPE_BOOL, dims: [ 1 ], optional: true }},  # true; false: never invoke memory
  {{ name: "STREAM", data_type: TYPE_BOOL, dims: [ 1 ], optional: true }}  # true; false: one response with every piece
]
output [
  {{ name: "TEXT", data_type: TYPE_STRING, dims: [ -1 ] }},
  {{ name: "EVENT", data_type: TYPE_STRING, dims: [ -1 ] }}  # token, short, long, end
]
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
parameters {{ key: "threads", value {{ string_value: "1" }} }}  # of onnxruntime, an answer
parameters {{ key: "workers", value {{ string_value: "2" }} }}  # answers at a time; further requests queue
version_policy {{ latest {{ num_versions: 1 }} }}
"""


def write_model_repository(bundle: Path, repository: Path, name: str, version: int, *, runtime: Path = RUNTIME) -> Path:
    """Write `repository/name/version` for an exported bundle, and return `repository/name`.

    Layout: `config.pbtxt`; `VERSION/model.py`, `VERSION/vismem/serving/runtime/`, `VERSION/bundle/` (hard links where
    the file system allows, else copies). Other versions already there stay. Raises UserError for a name or version
    that Triton would not take, a missing bundle, or a bundle whose files differ from its manifest.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"deploy.model_name '{name}': use letters, digits, '_', '-' and '.' only")
    if version < 1:
        raise UserError(f"model version {version}: Triton takes whole numbers from 1")
    if not MODEL_SOURCE.is_file():
        raise UserError(f"{MODEL_SOURCE} is missing: run from a checkout of the repository (pip install -e .)")
    check_bundle(bundle)
    folder = repository / name / str(version)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name))
    shutil.copyfile(MODEL_SOURCE, folder / "model.py")
    package = folder / "vismem" / "serving" / "runtime"
    shutil.copytree(runtime, package, ignore=shutil.ignore_patterns("__pycache__"))
    for parent in (package.parent, package.parent.parent):
        (parent / "__init__.py").write_text('"""Of the library, only serving/runtime lies here."""\n')
    shutil.copytree(bundle, folder / "bundle", copy_function=_link_or_copy)
    return repository / name


def check_bundle(bundle: Path) -> None:
    """UserError with every problem if the files of `bundle` are not those that its manifest names."""
    if problems := verify_manifest(bundle):
        raise UserError(
            f"{bundle} is not the bundle that was exported: {'; '.join(problems)}; run `vismem export` again"
        )


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
