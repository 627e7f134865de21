"""Starts a run of the pipeline on a cluster with what profile and install know: image, namespace, account, sizes.

`kfp run create` cannot name a service account, so this is a few lines of Python with kfp's client: they are printed,
and run by another process, since nothing in `vismem/` imports kfp.
"""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from vismem.config import Config, resolve
from vismem.errors import UserError, first_line, nearest, one_line
from vismem.kubeflow.cluster import Cluster, load_cluster
from vismem.kubeflow.parameters import refuse_credentials

ACCOUNT, IMAGE, EXPERIMENT = "vismem-pipeline", "vismem-train", "vismem"
PIPELINE = Path("pipelines/vismem.yaml")  # with another volume or other settings it has the same parameters
TOKEN = "KF_PIPELINES_SA_TOKEN_PATH"  # kfp's variable: the file of a token for a Kubeflow of many users
OPTIONS = {"profile": "--profile", "overrides": "--set"}  # parameters of the pipeline that are checked before
SCRIPT = """\
import kfp
from pipelines.pipeline import make_pipeline
from vismem.kubeflow.cluster import load_cluster
client = kfp.Client(host={endpoint!r}{credentials})
namespace = {namespace!r} if client.get_kfp_healthz().multi_user else None
client.create_run_from_pipeline_func(
    make_pipeline(shared_volume={shared!r}, cluster=load_cluster({cluster!r})),
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
        """Read kustomization.yaml. UserError for none, a broken one, or where the registry is still the example's."""
        file = overlay / "kustomization.yaml"
        if not file.is_file():
            raise UserError(f"no {file}: run in the project's root, or name your overlay with --overlay")
        try:
            values = yaml.load(file.read_text(), yaml.BaseLoader)  # all texts: a tag 1.10 is no number
            image: dict[str, str] = next((one for one in values.get("images") or () if one["name"] == IMAGE), {})
            namespace, name = str(values["namespace"]), str(image.get("newName", IMAGE))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, LookupError, TypeError) as error:
            raise UserError(f"{file} is no kustomization with namespace and images: {first_line(error)}") from None
        if "/" not in name or name.startswith("registry.example.com"):
            raise UserError(
                f"{file} names no registry of yours for {IMAGE}: push the image, and name it under `images`"
            )
        reference = f"{name}@{image['digest']}" if "digest" in image else f"{name}:{image.get('newTag', 'latest')}"
        shared = any(Path(part).name == "multi-node" for part in values.get("components") or ())
        return cls(namespace, reference, shared)


@dataclass(frozen=True)
class Request:
    """A run that is asked for.

    `given`: parameters of the pipeline and settings of its pods, as texts; `settings`: overrides of params.yaml.
    """

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
    if not PIPELINE.is_file():
        raise UserError(f"no {PIPELINE} here: run in the project's root")
    config = resolve(request.profile, request.settings)
    refuse_credentials(config)
    try:
        known = next(yaml.safe_load_all(PIPELINE.read_text()))["root"]["inputDefinitions"]["parameters"]
    except (yaml.YAMLError, StopIteration, KeyError, TypeError) as error:
        raise UserError(f"{PIPELINE} is no compiled pipeline ({one_line(error)}): `git checkout` it") from None
    arguments, settings = split(request, install, config, known)
    notes = check_sizes(config, load_cluster(settings))
    if "@" not in install.image:
        notes.append(UNPINNED.format(install.image))
    for note in notes:
        print(f"vismem submit: {note}", file=sys.stderr)
    credentials = ", credentials=kfp.client.ServiceAccountTokenVolumeCredentials()" if os.environ.get(TOKEN) else ""
    script = SCRIPT.format(
        endpoint=endpoint,
        credentials=credentials,
        namespace=request.namespace or install.namespace,
        shared=install.shared,
        cluster=settings,
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


def split(
    request: Request, install: Install, config: Config, known: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of the pipeline, which knows `known`, and the settings of its pods, see `Cluster`.

    What is given wins over the profile's `cluster`. UserError for a name that neither has.
    """
    arguments: dict[str, Any] = {"profile": request.profile, "image": install.image}
    if request.settings:
        arguments["overrides"] = dict(request.settings)
    settings = dict(config.cluster)
    for name, value in request.given.items():
        if name in OPTIONS:
            raise UserError(f"{name} is no parameter to give here: use {OPTIONS[name]}")
        if name in Cluster.model_fields:
            try:
                settings[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"{name}={value} is no YAML: {one_line(error)}") from None
        elif name in known:
            arguments[name] = value
        else:
            names = (*known, *Cluster.model_fields)
            raise UserError(f"the pipeline has no parameter '{name}'{nearest(name, names)}; --set is for params.yaml's")
    return arguments, settings


def check_sizes(config: Config, cluster: Cluster) -> list[str]:
    """Hold the pods' sizes to what the profile needs; returns what could not be checked.

    UserError for less GPUs than it asks for, or less memory than training or `export` take.
    """
    if not config.preflight.gpus:
        return []
    processes = cluster.num_processes
    gpus = processes if cluster.launches else cluster.gpu_count
    if gpus < max(config.preflight.gpus, processes):
        raise UserError(
            f"gpu_count={gpus} for {processes} processes of a profile that asks for {config.preflight.gpus} GPUs "
            "(preflight.gpus): it would train on the CPU"
        )
    if not cluster.evaluation_gpu_count:
        raise UserError("evaluation_gpu_count=0: `evaluate` would decode with this base on the CPU, for days")
    from kubernetes.utils.quantity import parse_quantity  # type: ignore[import-untyped]

    from vismem.plan import host_memory

    try:
        needs = host_memory(config, processes)
    except UserError as error:
        return [f"memory was not checked: {error}"]
    for what, size in needs.items():
        setting = "evaluation_memory" if what == "export" else "training_memory"
        if size > parse_quantity(memory := getattr(cluster, setting)):
            raise UserError(f"{setting}={memory} is too small ({what}: {size / 1e9:.0f} GB): give {setting}=...Gi")
    return []
