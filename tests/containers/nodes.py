"""A node of the cluster model: runs its pods in real containers, as the Docker API lets it."""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import docker
from docker.models.containers import Container
from kfp_model import Pod, PodEndedError, Values

LAUNCHER = Path(__file__).parent / "launcher.py"
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class Node:
    """One core of a machine with an engine.

    `claims`: the folder behind each claim of a volume; `secrets`: of each the values; `store`: how the launcher opens
    the object store, as keywords of `boto3.client`. `logs` has those of its pods by task; `evict` says of a task when
    its next pod is killed.
    """

    def __init__(
        self,
        engine: docker.DockerClient,
        folder: Path,
        *,
        claims: Mapping[str, Path],
        secrets: Mapping[str, Mapping[str, str]],
        store: Mapping[str, str],
    ) -> None:
        self.engine, self.folder, self.claims, self.secrets, self.store = engine, folder, claims, secrets, store
        self.logs: dict[str, list[str]] = {}
        self.evict: dict[str, Callable[[], bool]] = {}

    def execute(self, pod: Pod) -> Values:
        """The output parameters of the pod; metadata of its artifacts goes to them. PodEndedError as the pod ended."""
        logs = self.logs.setdefault(pod.task, [])
        name = f"{pod.manifest['metadata']['name']}-{len(logs)}"
        volumes = {path: self.volume(volume, self.folder / name) for path, volume in pod.volumes.items()}
        launcher = Path(volumes["/kfp-launcher"])
        shutil.copy(LAUNCHER, launcher / "launch")
        (launcher / "launch").chmod(0o555)
        (launcher / "store.json").write_text(json.dumps(self.store))
        main, security = pod.main, pod.main["securityContext"]
        container = self.engine.containers.create(
            main["image"],
            entrypoint=main["command"],
            command=main["args"],
            environment=self.environment(pod),
            volumes={folder: {"bind": path, "mode": "rw"} for path, folder in volumes.items()},
            mem_limit=_bytes(main["resources"]["limits"]["memory"]),
            cap_drop=security["capabilities"]["drop"],
            security_opt=[] if security["allowPrivilegeEscalation"] else ["no-new-privileges"],
            network_mode="host",
        )
        try:
            container.start()
            lost = self.wait(container, self.evict.pop(pod.task, None))
            logs.append(container.logs().decode())
            status = container.attrs["State"]["ExitCode"]
        finally:
            container.remove(force=True)
        if lost:
            raise PodEndedError("LOST")
        published = json.loads((launcher / "published.json").read_text())
        assert (status == 0) == (published["state"] == "COMPLETE"), logs[-1]
        if status:
            raise PodEndedError("FAILED")
        for port, artifact in published["artifacts"].items():
            pod.made[port].update(artifact)
        shutil.rmtree(self.folder / name)
        returned: Values = published["parameters"]
        return returned

    def volume(self, volume: Values, folder: Path) -> str:
        """The folder behind a volume: what is claimed, or an empty one that everybody may write to."""
        if claim := volume.get("persistentVolumeClaim"):
            return str(self.claims[claim["claimName"]])
        made = folder / volume["name"]
        made.mkdir(parents=True, exist_ok=True)
        made.chmod(0o777)
        return str(made)

    def environment(self, pod: Pod) -> dict[str, str]:
        """The pod's variables; a secret that is optional may be missing, or lack the key."""
        found: dict[str, str] = {}
        for variable in pod.main["env"]:
            if "value" in variable:
                found[variable["name"]] = variable["value"]
            elif secret := variable["valueFrom"].get("secretKeyRef"):
                held = self.secrets.get(secret["name"], {})
                assert secret["key"] in held or secret.get("optional"), f"no {secret['key']} in {secret['name']}"
                found |= {variable["name"]: held[secret["key"]]} if secret["key"] in held else {}
        return found

    @staticmethod
    def wait(container: Container, evicted: Callable[[], bool] | None) -> bool:
        """Wait for its end; returns whether it was killed."""
        while container.status in ("created", "running"):
            if evicted is not None and container.status == "running" and evicted():
                container.kill()
                return True
            time.sleep(0.2)
            container.reload()
        return False


def _bytes(quantity: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]i)", quantity)
    assert found, quantity
    return int(found[1]) * UNITS[found[2]]
