"""The serving environment: a Python environment with tritonserver from the nvidia-pytriton wheel, apart from ours.

Apart, because Triton's Python backend needs numpy < 2. `make serving` makes it from deploy/triton/requirements.txt.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import vismem
from vismem.errors import UserError

VARIABLE = "VISMEM_SERVING_PYTHON"
DEFAULT_PYTHON = Path(vismem.__file__).parent.parent / ".venv-serving" / "bin" / "python"

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
    backend: Path  # folder of the Python backend
    stub: Path  # the backend's child process for this version of Python
    libraries: tuple[Path, ...]  # for LD_LIBRARY_PATH

    def make_backend_folder(self, folder: Path) -> Path:
        """Lay the Python backend and the right stub into `folder`, as tritonserver wants them; return it."""
        target = folder / "python"
        target.mkdir(parents=True)
        for file in self.backend.iterdir():
            (target / file.name).symlink_to(file)
        (target / self.stub.name).symlink_to(self.stub)
        return folder

    def variables(self) -> dict[str, str]:
        """The process environment for tritonserver: this environment's packages, nothing of the caller's Python."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        path = [str(self.python.parent), kept.get("PATH", os.defpath)]  # the stub finds its packages through python3
        libraries = [*map(str, self.libraries), kept.get("LD_LIBRARY_PATH", "")]
        return kept | {
            "PATH": os.pathsep.join(path),
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
        raise UserError(f"{source}, and it is not there: run `make serving`, or set {VARIABLE} to its python")
    done = subprocess.run([python, "-I", "-c", _QUERY], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{python} does not run: {done.stderr.strip()[-300:]}; run `make serving` again")
    facts = json.loads(done.stdout)
    if facts["pytriton"] is None:
        raise UserError(f"{python} has no nvidia-pytriton, which ships tritonserver: run `make serving` again")
    package = Path(facts["pytriton"])
    server = package / "tritonserver"
    stub = server / "python_backend_stubs" / facts["version"] / "triton_python_backend_stub"
    for part in (server / "bin" / "tritonserver", stub):
        if not part.is_file():
            raise UserError(f"{part} is missing from nvidia-pytriton for Python {facts['version']}: run `make serving`")
    shared = [Path(folder) for folder in facts["folders"] if (Path(folder) / facts["library"]).is_file()]
    if not shared:
        raise UserError(
            f"tritonserver needs the shared library {facts['library']} of Python {facts['version']}: "
            f"`apt-get install libpython{facts['version']}` (looked in {', '.join(facts['folders'])})"
        )
    return ServingEnvironment(
        python=python,
        binary=server / "bin" / "tritonserver",
        backend=server / "backends" / "python",
        stub=stub,
        libraries=(package.parent / "nvidia_pytriton.libs", shared[0]),
    )
