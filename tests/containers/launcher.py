#!/usr/bin/env python3
"""Stands in for Kubeflow's launcher in a task's container: it brings artifacts, runs the command, stores artifacts.

Rules: kubeflow/pipelines 2.17, backend/src/v2, component/launcher_v2.go and objectstore/object_store.go. The real one
asks Kubernetes for the store's keys and publishes to ML Metadata: here they lie in files beside this one.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

Values = dict[str, Any]

HERE = Path(__file__).parent
STORE, PUBLISHED = HERE / "store.json", HERE / "published.json"
SCHEMES = {"gs://": "/gcs/", "minio://": "/minio/", "s3://": "/s3/"}
LOGS = "executor-logs"


def main() -> int:
    """Launch what the arguments say; publish how it ended."""
    _, flag, text, dashes, *command = sys.argv
    assert (flag, dashes) == ("--executor_input", "--"), sys.argv
    given = json.loads(text)
    made = {port: listed["artifacts"][0] for port, listed in given["outputs"].get("artifacts", {}).items()}
    store = Store(json.loads(STORE.read_text()))
    made[LOGS]["uri"] += f"-{os.environ.get('KFP_RETRY_INDEX', '0')}"
    returned: Values = {}
    state, recorded = "FAILED", {}
    try:
        for listed in given["inputs"].get("artifacts", {}).values():
            for artifact in listed["artifacts"]:
                store.download(artifact["uri"])
        returned = execute([word.replace("{{$}}", json.dumps(given)) for word in command], given["outputs"], made)
        recorded, state = made, "COMPLETE"
    except subprocess.CalledProcessError as error:
        logging.error("Component failed to execute successfully: %s", error)
        recorded = {LOGS: made[LOGS]}
    try:
        for artifact in recorded.values():
            store.upload(artifact["uri"])
    except OSError as error:
        logging.error("failed to upload: %s", error)
        state = "FAILED"
    PUBLISHED.write_text(json.dumps({"state": state, "parameters": returned, "artifacts": recorded}))
    return 0 if state == "COMPLETE" else 1


def execute(command: list[str], outputs: Values, made: Values) -> Values:
    """Run the command; merge what it says of its artifacts into `made`, and return its parameters.

    Of a folder to write to there is the parent. CalledProcessError where it fails.
    """
    files = [Path(parameter["outputFile"]) for parameter in outputs.get("parameters", {}).values()]
    for path in [*files, *(local(artifact["uri"]) for artifact in made.values())]:
        path.parent.mkdir(parents=True, exist_ok=True)
    with local(made[LOGS]["uri"]).open("wb") as log:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert running.stdout is not None
        for line in running.stdout:
            for stream in (sys.stdout.buffer, log):
                stream.write(line)
                stream.flush()
    if status := running.wait():
        raise subprocess.CalledProcessError(status, command[0])
    said = Path(outputs["outputFile"])
    told: Values = json.loads(said.read_text()) if said.exists() else {}
    for port, listed in told.get("artifacts", {}).items():
        artifact, merged = listed["artifacts"][0], made[port]
        merged["uri"] = artifact.get("uri") or merged["uri"]
        merged["metadata"] = {**merged.get("metadata", {}), **artifact.get("metadata", {})}
    returned: Values = told.get("parameterValues", {})
    unknown = set(outputs.get("parameters", {})) - set(returned)
    assert not unknown, f"read from files by their type, which is not modelled: {unknown}"
    return returned


def local(uri: str) -> Path:
    """Where the artifact lies in the container."""
    scheme = uri[: uri.index("://") + 3]
    return Path(SCHEMES[scheme] + uri.removeprefix(scheme))


class Store:
    """The object store. Folders exist there by their files alone: an empty one is not found again."""

    def __init__(self, session: Values) -> None:
        config = Config(request_checksum_calculation="when_required", response_checksum_validation="when_required")
        self.client = boto3.client("s3", config=config, **session)

    def download(self, uri: str) -> None:
        """Bring the file, or the files of the folder, to its place in the container."""
        bucket, key = uri.partition("://")[2].split("/", 1)
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            for found in page.get("Contents", ()):
                if found["Key"] == key or found["Key"].startswith(f"{key}/"):
                    assert ".." not in found["Key"].split("/"), found["Key"]
                    path = local(uri + found["Key"].removeprefix(key))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(self.client.get_object(Bucket=bucket, Key=found["Key"])["Body"].read())

    def upload(self, uri: str) -> None:
        """Send the file, or the files of the folder. A task may leave none; a link to a folder is an OSError."""
        path = local(uri)
        if not path.exists():
            logging.warning("Local filepath %s does not exist", path)
        elif path.is_dir():
            for entry in os.scandir(path):
                below = f"{uri}/{entry.name}"
                self.upload(below) if entry.is_dir(follow_symlinks=False) else self.upload_file(below)
        else:
            self.upload_file(uri)

    def upload_file(self, uri: str) -> None:
        """Send one file."""
        bucket, key = uri.partition("://")[2].split("/", 1)
        with local(uri).open("rb") as file:
            self.client.put_object(Bucket=bucket, Key=key, Body=file)


if __name__ == "__main__":
    sys.exit(main())
