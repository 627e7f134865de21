"""Checks, before GPU time is spent, that a run can complete: secrets, buckets, registry, base model, machine.

Every check runs, whatever the others find, and none waits longer than seconds for a service that does not answer.
"""

import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from vismem.config import BaseConfig, Config, RegistryConfig
from vismem.data.source_files import source_bytes
from vismem.disk import free_space
from vismem.errors import UserError, mask_credentials, one_line
from vismem.files import read_json, write_text
from vismem.models.families import check_family

CONNECT_SECONDS, ANSWER_SECONDS = 3, 5  # a dead endpoint costs this, not the clients' own minute of retries
GB = 1e9
IMAGE = "1024x768"  # for which a run is planned
CHECK_S3 = "check AWS_ENDPOINT_URL_S3, the credentials, and that the S3 service runs and is reachable from here"


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to do where it failed."""

    name: str
    ok: bool
    seen: str
    remedy: str = ""


def preflight(config: Config, artifacts: Path, report: Path | None = None, shared: Path | None = None) -> list[Finding]:
    """Run all checks for a run whose outputs go to `artifacts`, print each finding, write them to `report` (Markdown).

    `shared`: a folder that all tasks of the run see. UserError that names every failed check with what to do.
    """
    findings = []
    for check in checks(config, artifacts, shared):
        findings.append(found := check())
        print(f"{'ok    ' if found.ok else 'FAILED'}  {found.name}: {mask_credentials(found.seen)}", flush=True)
    if report is not None:
        write_text(report, markdown(findings))
    if failed := [finding for finding in findings if not finding.ok]:
        reasons = "; ".join(f"({i}) {f.name}: {f.seen}: {f.remedy}" for i, f in enumerate(failed, start=1))
        raise UserError(f"{len(failed)} of {len(findings)} checks failed: {reasons}")
    return findings


def checks(config: Config, artifacts: Path, shared: Path | None = None) -> list[partial[Finding]]:
    """The checks that the parameters ask for, not yet run. A check that fails returns a finding; it does not raise."""
    wanted = config.preflight
    return [
        *(partial(check_variable, name) for name in wanted.environment),
        *(partial(check_bucket, bucket) for bucket in wanted.buckets),
        partial(check_registry, config.registry),
        partial(check_base, config.base.model),
        partial(check_gpus, wanted.gpus),
        *([partial(check_sizes, config)] if wanted.gpus else []),
        partial(check_disk, artifacts, wanted.free_disk_gb, data_gb(config, artifacts)),
        partial(check_shared_memory, wanted.shared_memory_gb),
        *([partial(check_shared, shared)] if shared else []),
    ]


def markdown(findings: Sequence[Finding]) -> str:
    """The findings as a table for Kubeflow's page of a run."""
    failed = sum(not finding.ok for finding in findings)
    verdict = f"**{failed} of {len(findings)} checks failed**" if failed else f"All {len(findings)} checks passed"
    lines = ["# Preflight", "", f"{verdict}.", "", "| check | result | seen | what to do |", "|---|---|---|---|"]
    for f in findings:
        cells = (f.name, "ok" if f.ok else "**failed**", f.seen, "" if f.ok else f.remedy)
        safe = (text.replace("|", "\\|").replace("\n", " ") for text in cells)
        lines.append(f"| {' | '.join(safe)} |")
    return mask_credentials("\n".join([*lines, ""]))


def check_variable(name: str) -> Finding:
    """Whether an environment variable is set; its value is never shown."""
    what, value = f"variable {name}", os.environ.get(name)
    if value is None or not value.strip():
        remedy = f"set {name}, on a cluster as a key of the secret that the pipeline's parameters name"
        return Finding(what, False, "not set" if value is None else "empty", remedy)
    if value != value.strip():
        remedy = "make the secret again without the line break that `echo` adds: `printf %s`"
        return Finding(what, False, "set, with white space around its value", remedy)
    return Finding(what, True, "set")


def check_bucket(bucket: str) -> Finding:
    """Whether an S3 bucket (or BUCKET/PREFIX) can be written, read and deleted from, with a small object.

    Endpoint and credentials are boto3's: AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY.
    """
    import boto3
    from botocore.config import Config as ClientConfig
    from botocore.exceptions import BotoCoreError, ClientError

    what, (name, _, prefix) = f"bucket {bucket}", bucket.removeprefix("s3://").partition("/")
    key = f"{prefix.strip('/')}/vismem-preflight-{uuid.uuid4().hex}".lstrip("/")
    once = {"total_max_attempts": 1}
    quick = ClientConfig(connect_timeout=CONNECT_SECONDS, read_timeout=ANSWER_SECONDS, retries=once)
    doing = "find"
    try:
        # a session of its own: the default one keeps the first credentials it saw
        client = boto3.Session().client("s3", config=quick)
        endpoint = client.meta.endpoint_url
        client.head_bucket(Bucket=name)
        doing = "write to"
        client.put_object(Bucket=name, Key=key, Body=key.encode())
        doing = "read from"
        same = client.get_object(Bucket=name, Key=key)["Body"].read() == key.encode()
        doing = "delete from"
        client.delete_object(Bucket=name, Key=key)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        reason, remedy = {
            403: ("not allowed (403)", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of that key"),
            404: ("not there (404)", f"make the bucket (`aws s3 mb s3://{name}`), or correct preflight.buckets"),
        }.get(status, (str(error), CHECK_S3))
        return Finding(what, False, f"could not {doing} it at {endpoint}: {reason}", remedy)
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no address
        return Finding(what, False, f"could not {doing} it: {_one_line(error)}", CHECK_S3)
    seen = "written, read and deleted from" if same else "another object came back than was written"
    return Finding(what, same, f"{seen} at {endpoint}", CHECK_S3)


def check_registry(config: RegistryConfig) -> Finding:
    """Whether MLflow answers and takes files."""
    from vismem.registry.tracking import ping

    try:
        return Finding("registry", True, ping(config))
    except Exception as error:  # noqa: BLE001 - a store's driver is missing, its file is none, and what else stores raise
        remedy = "start the MLflow server, or correct its address or credentials"
        return Finding("registry", False, _one_line(error), remedy)


def check_base(model: str) -> Finding:
    """Whether `base.model` can be had: a folder, or a hub id whose settings can be read or are cached."""
    what = f"base model {model}"
    try:
        settings, seen = _find_settings(model)
        values = read_json(settings)
        family = str(values.get("model_type") if isinstance(values, dict) else None)
        check_family(family)
        return Finding(what, True, seen.format(family))
    except (UserError, OSError, ValueError) as error:
        remedy = "set base.model to a folder or a hub id; on a machine without the hub, fill its cache (HF_HOME) first"
        return Finding(what, False, _one_line(error), remedy)


def check_gpus(wanted: int) -> Finding:
    """Whether at least `wanted` CUDA devices are there and compute."""
    if wanted == 0:
        return Finding("GPUs", True, "none asked for")
    import torch

    if torch.version.cuda is None:
        seen = f"torch {torch.__version__} is built without CUDA"
        return Finding("GPUs", False, seen, "use an image or an environment with a CUDA build of torch")
    try:
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        for device in range(len(names)):
            torch.ones(1, device=f"cuda:{device}").sum().item()
    except RuntimeError as error:
        return Finding("GPUs", False, _one_line(error), "check the driver: does `nvidia-smi` work on this machine?")
    seen = f"{len(names)}: {', '.join(names)}" if names else "none"
    remedy = f"give this machine or pod {wanted} (gpu_count of the pipeline), or lower preflight.gpus"
    return Finding("GPUs", len(names) >= wanted, seen, remedy)


def check_sizes(config: Config) -> Finding:
    """Whether stages and evaluation fit this machine's GPUs, and training and export its or its pod's memory.

    By `vismem.plan`, for images of IMAGE and the GPUs that are asked for: minutes for a model of 7B parameters.
    """
    gpus, what = config.preflight.gpus, "sizes"
    import torch

    from vismem.plan import plan
    from vismem.plan.machine import GIB, Machine, memory_limit
    from vismem.plan.report import refusals

    if torch.cuda.device_count() < gpus:
        return Finding(what, False, "not computed", "see the check of GPUs")
    try:
        found = plan(config, Machine.here(gpus), IMAGE)
    except UserError as error:
        return Finding(what, False, str(error), "make the base's small files readable here, or correct grpo.batch_size")
    memory, needed = memory_limit(), max(found.host.values())
    peaks = ", ".join(f"{step.name} {step.bytes / GIB:.1f}" for step in found.steps)
    on_gpu = f"{peaks} GiB of {found.machine.usable / GIB:.1f} on a GPU"
    seen = f"{on_gpu}; {needed / GB:.0f} GB of {memory / GB:.0f} of memory"
    remedies = [*refusals(found)]
    if needed > memory:
        remedies.append("give this machine or pod more memory (training_memory of the pipeline)")
    return Finding(what, not remedies, seen, "; ".join(remedies))


def data_gb(config: Config, artifacts: Path) -> float:
    """Before a first `prepare`, four times the source files: two steps write the data, DVC may copy both.

    Images that questions share may take more, `limit` or DVC's links less: 0 where `preflight.free_disk_gb` is.
    """
    if not config.preflight.free_disk_gb or (artifacts / "prepare").is_dir():
        return 0.0
    return 4 * source_bytes(config) / GB


def check_disk(folder: Path, wanted_gb: float, for_data_gb: float = 0.0) -> Finding:
    """Whether the disk of `folder` (which need not exist yet) has so much free."""
    size, there = free_space(folder)
    free = size / GB
    seen = f"{free:.1f} GB free at {there}, {wanted_gb:g} GB asked for"
    if for_data_gb:
        seen += f" and {for_data_gb:.1f} for the data, four times their files"
    remedy = "free some, use a larger volume, or lower preflight.free_disk_gb (0 asks for none, nor for the data)"
    return Finding("disk", free >= wanted_gb + for_data_gb, seen, remedy)


def check_shared_memory(wanted_gb: float, place: Path = Path("/dev/shm")) -> Finding:
    """Whether `place` is a shared memory of at least `wanted_gb`."""
    size = shutil.disk_usage(place).total / GB if place.is_dir() else 0.0
    seen = f"{size:.2f} GB at {place}, {wanted_gb:g} GB asked for"
    remedy = f"mount an emptyDir with medium: Memory at {place}; with docker or podman use --shm-size"
    return Finding("shared memory", size >= wanted_gb, seen, remedy)


def check_shared(folder: Path) -> Finding:
    """Whether this user can write below `folder`, which need not exist yet, on a volume that tasks share."""
    what = f"shared volume {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"vismem")
    except OSError as error:
        user = f"{os.geteuid()}:{os.getegid()}"
        remedy = f"give the volume to that user once: `chown {user}` its root in a pod that runs as root"
        return Finding(what, False, f"user {user} cannot write there: {_one_line(error)}", remedy)
    return Finding(what, True, f"written as user {os.geteuid()}")


def _find_settings(model: str) -> tuple[Path, str]:
    """The base's config.json, and how the base can be had ({} stands for its family).

    UserError, OSError (the hub's errors are such) or ValueError where it cannot.
    """
    folder = BaseConfig(model=model).folder()
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"the folder {folder} holds no config.json")
        return folder / "config.json", "a folder with a {}"
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]  # its HTTP client's error

    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=ANSWER_SECONDS)  # asks once; download retries
    except HfHubHTTPError:
        raise  # the hub has answered: no such model, or not for this token
    except (NoAnswer, OfflineModeIsEnabled) as error:
        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            raise UserError(f"the hub does not answer, and the cache has no {model} ({_one_line(error)})") from None
        return Path(cached), "a {} in the cache; the hub does not answer"
    return Path(hf_hub_download(model, "config.json")), "a {} on the hub"


def _one_line(error: Exception) -> str:
    return one_line(error)[:300]
