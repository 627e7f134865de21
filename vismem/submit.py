"""Starts a run of the pipeline on a cluster with what profile and install know: image, namespace, account, sizes.

`kfp run create` cannot name a service account, so this is a few lines of Python with kfp's client: they are printed,
and run by another process, since nothing in `vismem/` imports kfp.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from vismem.config import Config, resolve
from vismem.errors import UserError, nearest

ACCOUNT, IMAGE, EXPERIMENT = "vismem-pipeline", "vismem-train", "vismem"
PIPELINES = {False: "pipelines/vismem.yaml", True: "pipelines/vismem-shared.yaml"}  # with a shared volume
TOKEN = "KF_PIPELINES_SA_TOKEN_PATH"  # kfp's variable: the file of a token for a Kubeflow of many users
KINDS = {"NUMBER_INTEGER": int, "NUMBER_DOUBLE": float, "BOOLEAN": bool, "LIST": list, "STRUCT": dict, "STRING": str}
SCRIPT = """\
import kfp
client = kfp.Client(host={endpoint!r}{credentials})
namespace = {namespace!r} if client.get_kfp_healthz().multi_user else None
client.create_run_from_pipeline_package(
    {pipeline!r},
    run_name={run!r},
    experiment_name={experiment!r},
    namespace=namespace,
    service_account={account!r},
    arguments={arguments!r},
)
"""


@dataclass(frozen=True)
class Install:
    """What an overlay of deploy/kubernetes says of a cluster."""

    namespace: str
    image: str
    shared: bool  # its nodes share a volume

    @classmethod
    def read(cls, overlay: Path) -> "Install":
        """Read kustomization.yaml. UserError where there is none, or the registry is still that of the example."""
        file = overlay / "kustomization.yaml"
        if not file.is_file():
            raise UserError(f"no {file}: run in the project's root, or name your overlay with --overlay")
        values = yaml.safe_load(file.read_text())
        images = {image["name"]: image for image in values.get("images", ())}
        image = images.get(IMAGE, {})
        name = image.get("newName", IMAGE)
        if "/" not in name or name.startswith("registry.example.com"):
            raise UserError(
                f"{file} names no registry of yours for {IMAGE}: push the image, and name it under `images`"
            )
        reference = f"{name}@{image['digest']}" if "digest" in image else f"{name}:{image.get('newTag', 'latest')}"
        shared = any(Path(part).name == "multi-node" for part in values.get("components", ()))
        return cls(values["namespace"], reference, shared)


@dataclass(frozen=True)
class Request:
    """A run that is asked for; `given` are the pipeline's parameters as texts, `settings` overrides."""

    profile: str
    overlay: Path
    given: Mapping[str, str]
    settings: Mapping[str, Any]
    endpoint: str = ""
    namespace: str = ""


def submit(request: Request, dry: bool = False) -> int:
    """Print the Python that starts the run and, unless `dry`, run it; returns its exit status.

    UserError for a parameter that the pipeline does not have, and for pods that are too small for the profile.
    """
    endpoint = request.endpoint or os.environ.get("KF_PIPELINES_ENDPOINT", "")
    if not endpoint:
        raise UserError("no address of Kubeflow Pipelines: give --endpoint, or set KF_PIPELINES_ENDPOINT")
    install = Install.read(request.overlay)
    pipeline = Path(PIPELINES[install.shared])
    if not pipeline.is_file():
        raise UserError(f"no {pipeline} here: run in the project's root")
    config = resolve(request.profile, request.settings)
    spec = next(yaml.safe_load_all(pipeline.read_text()))
    known = spec["root"]["inputDefinitions"]["parameters"]
    arguments = arguments_of(request, install, config, known)
    defaults = {name: parameter.get("defaultValue") for name, parameter in known.items()}
    notes = check_sizes(config, defaults | arguments)
    if "@" not in install.image:
        notes.append(UNPINNED.format(install.image))
    for note in notes:
        print(f"vismem submit: {note}", file=sys.stderr)
    credentials = ", credentials=kfp.client.ServiceAccountTokenVolumeCredentials()" if os.environ.get(TOKEN) else ""
    script = SCRIPT.format(
        endpoint=endpoint,
        credentials=credentials,
        namespace=request.namespace or install.namespace,
        pipeline=str(pipeline),
        run=f"{request.profile or 'defaults'}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        experiment=EXPERIMENT,
        account=ACCOUNT,
        arguments=arguments,
    )
    print(f"python - <<'EOF'\n{script}EOF", flush=True)
    if dry:
        return 0
    if find_spec("kfp") is None:
        raise UserError("kfp is not installed here: pip install 'vismem[kubeflow]'")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False, capture_output=True, text=True)
    print(done.stdout, end="")
    if done.returncode:
        raise UserError(f"Kubeflow Pipelines at {endpoint}: {' '.join(done.stderr.split())[-1500:]}")
    return 0


UNPINNED = (
    "{} is a tag: Kubeflow's cache takes all images of one tag for the same code. "
    "Put the digest that `docker push` printed into the overlay, `digest: sha256:...` in place of newTag"
)


def arguments_of(
    request: Request, install: Install, config: Config, known: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The parameters of the pipeline, which knows `known`; what is given wins over the profile's `cluster`.

    With the back end `trainer` the nodes have the GPUs, and the launching pods none. UserError for a parameter that is
    not known, or whose value is of another type.
    """
    own: dict[str, Any] = {"profile": request.profile, "image": install.image}
    if request.settings:
        own["overrides"] = dict(request.settings)
    chosen = {**config.cluster, **request.given}
    if chosen.get("training_backend") == "trainer" and "gpu_count" not in request.given:
        chosen["gpu_count"] = 0
    arguments = {}
    for name, value in {**own, **chosen}.items():
        if name not in known:
            raise UserError(f"the pipeline has no parameter '{name}'{nearest(name, known)}; --set is for params.yaml's")
        arguments[name] = _typed(name, value, KINDS[known[name]["parameterType"]])
    return arguments


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is str:
        return str(value)
    found = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
        raise UserError(f"{name}={value}: give a value of type {kind.__name__}, as JSON")
    return found


def check_sizes(config: Config, arguments: Mapping[str, Any]) -> list[str]:
    """Hold the pods' sizes to what the profile needs; returns what could not be checked.

    UserError for less GPUs than it asks for, or less memory than training or `export` take.
    """
    if not config.preflight.gpus:
        return []
    processes, memory = int(arguments["num_processes"]), arguments["training_memory"]
    gpus = processes if arguments["training_backend"] == "trainer" else int(arguments["gpu_count"])
    if gpus < max(config.preflight.gpus, processes):
        raise UserError(
            f"gpu_count={gpus} for {processes} processes of a profile that asks for {config.preflight.gpus} GPUs "
            "(preflight.gpus): it would train on the CPU"
        )
    if not int(arguments["evaluation_gpu_count"]):
        raise UserError("evaluation_gpu_count=0: `evaluate` would decode with this base on the CPU, for days")
    from kubernetes.utils.quantity import parse_quantity  # type: ignore[import-untyped]

    from vismem.plan import host_memory

    try:
        needs = host_memory(config, processes)
    except UserError as error:
        return [f"memory was not checked: {error}"]
    if small := {what: size for what, size in needs.items() if size > parse_quantity(memory)}:
        reasons = "; ".join(f"{what}: {size / 1e9:.0f} GB" for what, size in small.items())
        raise UserError(f"training_memory={memory} is too small ({reasons}): give training_memory=...Gi")
    return []
