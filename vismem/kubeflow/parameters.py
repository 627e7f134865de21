"""The run's parameters, resolved once, and for each task those that can change its output: its key in a cache."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vismem.config import Config, resolve
from vismem.data.source_files import files_of, fingerprint
from vismem.errors import UserError
from vismem.files import write_text
from vismem.launch import LaunchConfig
from vismem.params_file import render_params
from vismem.provenance import sha256_file
from vismem.shipped import shipped
from vismem.steps import BASELINES, BY_NAME, STEPS

PACKAGES = Path(__file__).parents[2]  # where the folder `vismem` lies: a checkout, or site-packages
IDENTITY = "made_from"  # no section: what else the output depends on
TASKS = ("preflight", *(step.name for step in STEPS))


def configure(
    profile: str, overrides: Mapping[str, Any], page: str, launch: Mapping[str, Any], gpus: int, cluster: bool = False
) -> tuple[dict[str, Any], ...]:
    """The parameters of each of `TASKS`, in that order, and `launch` after them: what the component returns.

    All parameters, with their descriptions, also go to the file `page` as YAML. `gpus`: how many `preflight` must see.
    On a `cluster` it also asks for MLflow's address. UserError where a parameter is wrong, see `vismem.config.resolve`,
    and where the profile asks for more GPUs than there are to be: it would train on the CPU.
    """
    wanted = resolve(profile, overrides).preflight.gpus
    if cluster and gpus < wanted and launch.get("backend") != "trainer":
        raise UserError(
            f"the parameters ask for {wanted} GPUs (preflight.gpus), and gpu_count is {gpus}: give more, as `vismem "
            "submit` does, or for the CPU the override preflight.gpus=0"
        )
    config = resolve(profile, {"preflight.gpus": gpus if cluster else max(gpus, wanted), **overrides})
    if cluster:
        environment = tuple(dict.fromkeys((*config.preflight.environment, "MLFLOW_TRACKING_URI")))
        preflight = config.preflight.model_copy(update={"environment": environment})
        config = config.model_copy(update={"preflight": preflight})
    write_text(Path(page), render_params(config))
    return (*(parameters_of(task, config) for task in TASKS), dict(launch))


def launch_fields(
    backend: str,
    num_processes: int,
    num_nodes: int,
    image: str,
    gpu_type: str,
    cpu: str,
    memory: str,
    tolerations: Sequence[Mapping[str, Any]],
    node_selector: Mapping[str, str],
) -> dict[str, Any]:
    """The fields of `vismem.launch.LaunchConfig` that matter to this back end, as plain values. UserError as from that.

    A node of `trainer` gets `cpu` cores, `memory` and a GPU per process. Empty for a single process, so that a cache of
    tasks does not depend on settings without effect.
    """
    fields: dict[str, Any] = {"backend": backend, "num_processes": num_processes, "num_nodes": num_nodes}
    if backend == "trainer":
        resources = {gpu_type: num_processes, "cpu": cpu, "memory": memory}
        fields |= {"image": image, "resources": resources, "tolerations": tolerations, "node_selector": node_selector}
    LaunchConfig(**fields)
    return {} if backend == "process" else fields


def parameters_of(name: str, config: Config) -> dict[str, Any]:
    """The parameters for the task `name`, as plain values: the sections of its step and of all steps before it.

    The earlier ones cost no cache hit: what they change reaches the step through its inputs. `export` also writes the
    baselines' section into the lineage; `preflight` and `register`, which are never cached, get all sections. For a
    step, `IDENTITY` names its code, and for `prepare` the files of its sources, so that a cache that knows only
    parameters and inputs runs the step again when these change. Nulls are left out: Kubeflow has none, and they are
    the defaults of their keys.
    """
    values: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    if name == "preflight":
        return values
    if name != "register":
        recorded = {section for step in BASELINES for section in step.sections} if name == "export" else set()
        values = {section: value for section, value in values.items() if section in _sections(name) | recorded}
    identity = {"code": code_fingerprint(name)}
    if name == "prepare":
        identity["sources"] = sources_fingerprint(config)
    return {**values, IDENTITY: identity}


def _sections(name: str) -> set[str]:
    step = BY_NAME[name]
    return set(step.sections).union(*(_sections(earlier) for earlier in step.inputs))


def code_fingerprint(name: str, root: Path = PACKAGES) -> str:
    """Hex sha256 over the code that the step uses, as dvc.yaml lists it among the stage's dependencies.

    `root` holds the folder `vismem`; what a wheel carries elsewhere is found too.
    """

    def place(relative: str) -> Path:
        return root / relative if (root / relative).exists() else shipped(relative)

    deps = yaml.safe_load(place("dvc.yaml").read_text())["stages"][name]["deps"]
    code = [dep for dep in deps if dep != "data" and not dep.startswith("artifacts/")]  # not the inputs and sources
    files = [(dep, file) for dep in code for file in _files(place(dep)) if file.suffix != ".pyc"]
    return _sha256(f"{dep}/{file.relative_to(place(dep)).as_posix()} {sha256_file(file)}" for dep, file in files)


def sources_fingerprint(config: Config) -> str:
    """The fingerprint of the files that all sources read. Missing files are `prepare`'s to report."""
    return fingerprint(file for source in config.prepare.sources for file in files_of(source))


def _files(place: Path) -> list[Path]:
    return sorted(path for path in (place, *place.rglob("*")) if path.is_file())


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
