"""The serving environment: a Python environment, and the Triton of NVIDIA's image or of the nvidia-pytriton wheel.

Apart from ours, because Triton's Python backend needs numpy < 2. `make serving` makes the wheel's from
deploy/triton/requirements.txt.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vismem.errors import UserError
from vismem.shipped import shipped

VARIABLE = "VISMEM_SERVING_PYTHON"
TRITON_VARIABLE = "VISMEM_TRITON"  # NVIDIA's folder, /opt/tritonserver in its image; empty: the wheel's Triton
DEFAULT_PYTHON = Path(__file__).parents[2] / ".venv-serving" / "bin" / "python"

STUB = "triton_python_backend_stub"  # the Python backend's child process; NVIDIA's is for its image's Python

_QUERY = """
import importlib.util, json, os, sys, sysconfig
found = importlib.util.find_spec("pytriton")
base, multiarch, library = (sysconfig.get_config_var(name) or "" for name in ("LIBDIR", "MULTIARCH", "INSTSONAME"))
print(json.dumps({
    "pytriton": os.path.dirname(found.origin) if found else None,
    "version": sysconfig.get_python_version(),
    "library": library,
    "folders": [base, os.path.join(base, multiarch), os.path.join(sys.base_prefix, "lib")],
}))
"""


@dataclass(frozen=True)
class ServingEnvironment:
    """Where the parts of tritonserver lie, all absolute."""

    python: Path
    binary: Path  # tritonserver
    stub: Path  # the Python backend's child process for this version of Python
    libraries: tuple[Path, ...]  # for LD_LIBRARY_PATH

    def make_backend_folder(self, folder: Path) -> Path:
        """Lay the Python backend and the right stub into `folder`, as tritonserver wants them; return it."""
        target = folder / "python"
        target.mkdir(parents=True)
        files = [*self.binary.parents[1].glob("backends/python/*"), self.stub]
        for name, file in {file.name: file for file in files}.items():
            (target / name).symlink_to(file)
        return folder

    def variables(self) -> dict[str, str]:
        """The process environment for tritonserver: this environment's packages, nothing of the caller's Python."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        libraries = [*map(str, self.libraries), kept.get("LD_LIBRARY_PATH", "")]
        return kept | {
            # The stub finds its packages through python3.
            "PATH": os.pathsep.join((str(self.python.parent), kept.get("PATH", os.defpath))),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1",
        }


def find_serving_environment() -> ServingEnvironment:
    """The environment that VISMEM_SERVING_PYTHON names, else `.venv-serving` of the checkout.

    Raises UserError if it, tritonserver, the stub for its Python or the shared libpython is missing.
    """
    named = os.environ.get(VARIABLE)
    python = Path(os.path.abspath(named)) if named else DEFAULT_PYTHON  # not resolve(): that would leave the venv
    if not os.access(python, os.X_OK):
        source = f"{VARIABLE} names {python}" if named else f"the serving environment {python}"
        needs = os.path.relpath(shipped("deploy/triton/requirements.txt"))
        raise UserError(
            f"{source}, and it is not there: run `make serving` in a checkout, or install what {needs} lists into an "
            f"environment of its own, and set {VARIABLE} to its python"
        )
    done = subprocess.run([python, "-I", "-c", _QUERY], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{python} does not run: {done.stderr.strip()[-300:]}; run `make serving` again")
    facts = json.loads(done.stdout)
    version, library, folders = facts["version"], facts["library"], facts["folders"]
    if triton := os.environ.get(TRITON_VARIABLE):
        home, source = Path(triton), f"the Triton that {TRITON_VARIABLE} names: `vismem-serve` has one that is whole"
        libraries, stub = home / "lib", home / "backends" / "python" / STUB
    elif facts["pytriton"] is None:
        raise UserError(f"{python} has no nvidia-pytriton, which ships tritonserver: run `make serving` again")
    else:
        package, source = Path(facts["pytriton"]), f"nvidia-pytriton for Python {version}: run `make serving`"
        home, libraries = package / "tritonserver", package.parent / "nvidia_pytriton.libs"
        stub = home / "python_backend_stubs" / version / STUB
    binary = home / "bin" / "tritonserver"
    for part in (binary, stub):
        if not part.is_file():
            raise UserError(f"{part} is missing from {source}")
    shared = next((Path(folder) for folder in folders if (Path(folder) / library).is_file()), None)
    if shared is None:
        raise UserError(
            f"tritonserver needs the shared library {library} of Python {version}: "
            f"`apt-get install libpython{version}` (looked in {', '.join(folders)})"
        )
    return ServingEnvironment(python, binary, stub, (libraries, shared))
