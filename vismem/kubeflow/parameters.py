"""The run's parameters, resolved once, and for each task those that can change its output: its key in a cache."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vismem.config import DEFAULT_BASE, Config, DvcSource, resolve
from vismem.data.dvc_source import pinned
from vismem.data.source_files import files_of, fingerprint, rule_files
from vismem.errors import UserError, mask_credentials
from vismem.files import write_text
from vismem.params_file import render_params
from vismem.provenance import sha256_file
from vismem.shipped import shipped
from vismem.steps import BASELINES, STEPS, all_sections

PACKAGES = Path(__file__).parents[2]  # where the folder `vismem` lies: a checkout, or site-packages
IDENTITY = "made_from"  # no section: what else the output depends on
S3_PREFIX = "VISMEM_"  # of the variables with S3's keys
TASKS = ("preflight", *(step.name for step in STEPS))


def configure(
    profile: str, overrides: Mapping[str, Any], page: str, image: str = "", gpus: int = 0, launches: bool = False
) -> tuple[dict[str, Any], ...]:
    """The parameters of each of `TASKS`, in that order: what the component returns.

    All parameters, with their descriptions, also go to the file `page` as YAML. `gpus`: how many `preflight` must see.
    `image` is the cluster's, empty elsewhere; there `preflight` also asks for MLflow's address. `launches`: others
    train. UserError where a parameter is wrong, see `vismem.config.resolve`, names data that no task has, or a revision
    that is not there, where the image's name may mean another one tomorrow, and where the profile asks for more GPUs
    than there are to be: it would train on the CPU.
    """
    take_s3_keys()
    asked = resolve(profile, overrides)
    if image:
        refuse_credentials(asked)
    wanted = asked.preflight.gpus
    if image and gpus < wanted and not launches:
        raise UserError(
            f"the parameters ask for {wanted} GPUs (preflight.gpus), and gpu_count is {gpus}: give more, as `vismem "
            "submit` does, or for the CPU the override preflight.gpus=0"
        )
    config = pinned(resolve(profile, {"preflight.gpus": gpus if image else max(gpus, wanted), **overrides}))
    if image:
        check_image(image)
        check_sources(config)
        environment = tuple(dict.fromkeys((*config.preflight.environment, "MLFLOW_TRACKING_URI")))
        preflight = config.preflight.model_copy(update={"environment": environment})
        config = config.model_copy(update={"preflight": preflight})
    write_text(Path(page), render_params(config))
    return tuple(parameters_of(task, config) for task in TASKS)


def take_s3_keys() -> None:
    """Give this process, and no other, the S3 keys by the names that clients read.

    Kubeflow's launcher, its parent, reads the same names and would look for the run's artifacts in our store.
    """
    prefix = f"{S3_PREFIX}AWS_"
    os.environ.update({key[len(S3_PREFIX) :]: value for key, value in os.environ.items() if key.startswith(prefix)})


def check_image(image: str) -> None:
    """UserError for an image without tag or digest, or with the tag `latest`."""
    name = image.rpartition("/")[2]
    if "@" not in name and name.partition(":")[2] in ("", "latest"):
        raise UserError(
            f"image '{image}' has a tag that moves: nodes would run different code under one name. Name it by digest "
            "(REGISTRY/vismem-train@sha256:...) or by a tag that is never pushed again, such as the version"
        )


def check_sources(config: Config) -> None:
    """UserError for a source whose files do not lie here, where a cluster's tasks run."""
    for source in config.prepare.sources:
        path = None if isinstance(source, DvcSource) else getattr(source, "path", None)
        if path is not None and not Path(path).exists():
            raise UserError(
                f"prepare.sources names {path}, which no task of a cluster has: its image holds no data. Name a source "
                "of the kind `dvc` there (docs/data.md), or a path on the shared volume"
            )


def refuse_credentials(config: Config) -> None:
    """UserError for a URI with a password or token: parameters stand in a run's arguments, logs and pages.

    A user's name alone is none where a key is what is asked for (ssh://git@host).
    """
    parameters = re.sub("ssh://[^:/@]+@", "ssh://", config.model_dump_json(by_alias=True))
    if (masked := mask_credentials(parameters)) != parameters:
        place = next(i for i, (one, other) in enumerate(zip(parameters, masked, strict=False)) if one != other)
        raise UserError(
            f"a parameter holds credentials, for all to read who may see a run: ...{masked[:place][-40:]}***...; "
            "give them by a secret, or by Git's credential helper"
        )


def parameters_of(name: str, config: Config) -> dict[str, Any]:
    """The parameters for the task `name`, as plain values: the sections of its step and of all steps before it.

    The earlier ones cost no cache hit: what they change reaches the step through its inputs. `export` also writes the
    baselines' section into the lineage; `preflight` and `register`, which are never cached, get all sections. For a
    step, `IDENTITY` names its code, the files of `prepare`'s sources, those of `validate`'s rules, and those of the
    folder that is the base or that stage I starts from, so that a cache that knows only parameters and inputs runs the
    step again when these change. Nulls are left out: Kubeflow has none,
    and they are the defaults of their keys.
    """
    values: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    if name == "preflight":
        return values
    if name != "register":
        recorded = {section for step in BASELINES for section in step.sections} if name == "export" else set()
        values = {section: value for section, value in values.items() if section in all_sections(name) | recorded}
    identity = {"code": code_fingerprint(name)}
    if name == "prepare":
        identity["sources"] = sources_fingerprint(config)
    if name == "validate" and (files := rule_files(config)):
        identity["rules"] = fingerprint(files)
    given = {"base": config.base.model, "stage1": config.stage1.start_from}.get(name)
    if given and given != DEFAULT_BASE and Path(given).is_dir():
        identity["given"] = fingerprint(_files(Path(given)))
    return {**values, IDENTITY: identity}


def code_fingerprint(name: str, root: Path = PACKAGES) -> str:
    """Hex sha256 over the code that the step uses, as dvc.yaml lists it among the stage's dependencies.

    `root` holds the folder `vismem`; what a wheel carries elsewhere is found too.
    """

    def place(relative: str) -> Path:
        return root / relative if (root / relative).exists() else shipped(relative)

    deps = yaml.safe_load(place("dvc.yaml").read_text())["stages"][name]["deps"]
    code = [dep for dep in deps if dep != "data" and not dep.startswith("artifacts/")]  # not the inputs and sources
    files = [(dep, file) for dep in code for file in _files(place(dep)) if file.suffix != ".pyc"]
    lines = [f"{dep}/{file.relative_to(place(dep)).as_posix()} {sha256_file(file)}" for dep, file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sources_fingerprint(config: Config) -> str:
    """The fingerprint of the files that all sources read. Missing files are `prepare`'s to report."""
    return fingerprint(file for source in config.prepare.sources for file in files_of(source))


def _files(place: Path) -> list[Path]:
    return sorted(path for path in (place, *place.rglob("*")) if path.is_file())
