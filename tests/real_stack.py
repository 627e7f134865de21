"""`vismem stack` as people start it, for tests that use its services."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg2

from vismem.stack import BUCKET

ANY_PORTS = ("--mlflow-port", "0", "--s3-port", "0", "--postgres-port", "0")


class Stack:
    """The command in a folder, and what it tells those who use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        output = self.folder.with_suffix(".out")
        command = [sys.executable, "-m", "vismem.cli", "stack", "--data", str(self.folder), *ANY_PORTS]
        with output.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while "ready: " not in output.read_text():
            assert self.process.poll() is None, output.read_text()
            time.sleep(0.1)
        self.said = output.read_text()
        lines = (self.folder / "env").read_text().splitlines()
        self.environment = dict(shlex.split(line)[1].split("=", 1) for line in lines)

    @property
    def secrets(self) -> dict[str, str]:
        return dict(json.loads((self.folder / "secrets.json").read_text()))

    def query(self, sql: str) -> list[Any]:
        """The rows that PostgreSQL holds."""
        port = re.search(r"PostgreSQL +127\.0\.0\.1:(\d+)", self.said)
        assert port is not None
        password = self.secrets["postgres_password"]
        connection = psycopg2.connect(f"postgresql://vismem:{password}@127.0.0.1:{port[1]}/mlflow")
        try:
            cursor = connection.cursor()
            cursor.execute(sql)
            return list(cursor.fetchall())
        finally:
            connection.close()

    @property
    def s3(self) -> dict[str, str]:
        """Keywords of `boto3.client` that open its S3 server."""
        return {
            "endpoint_url": self.environment["AWS_ENDPOINT_URL_S3"],
            "aws_access_key_id": self.secrets["access_key"],
            "aws_secret_access_key": self.secrets["secret_key"],
            "region_name": "us-east-1",
        }

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What lies in the bucket below a prefix."""
        client = boto3.client("s3", **self.s3)
        found = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [item["Key"] for page in found for item in page.get("Contents", ())]
        return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """A stack that keeps its data in the folder; nothing of it is left running."""
    stack = Stack(folder)
    services = psutil.Process(stack.process.pid).children(recursive=True)
    try:
        yield stack
    finally:
        services += psutil.Process(stack.process.pid).children(recursive=True)
        ports = json.loads((stack.folder / "ports.json").read_text()).values()
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(60) == 0
        assert not psutil.wait_procs(services, timeout=60)[1]
        assert not [port for port in ports if list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))]
