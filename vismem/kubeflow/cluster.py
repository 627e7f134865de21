"""What the tasks' pods ask of a cluster. It is compiled into the pipeline, since Kubeflow's cache takes each of a run's
parameters for something that changes the output: another memory limit would train again.

The variable VISMEM_CLUSTER names a YAML file with what differs from these defaults.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from vismem.config import Section, load_params
from vismem.errors import UserError, nearest
from vismem.launch.config import Backend, LaunchConfig

VARIABLE = "VISMEM_CLUSTER"
HOUR = 3600  # seconds
QUANTITY = r"^\d+(\.\d+)?([eE]\d+|m|k|[KMGTPE]i?)?$"


class Cluster(Section):
    """Settings of the pods. Quantities are as Kubernetes writes them."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    task_cpu: str = Field("2", pattern=QUANTITY, description="cores of a task that neither trains nor decodes")
    task_memory: str = Field("8Gi", pattern=QUANTITY, description="memory of such a task")
    task_hours: int = Field(6, gt=0, description="a try of such a task is stopped after them")
    training_cpu: str = Field(
        "4", pattern=QUANTITY, description="cores of preflight, stage I and II, or of a node of `trainer`"
    )
    training_memory: str = Field("16Gi", pattern=QUANTITY, description="memory of such a task or node")
    evaluation_cpu: str = Field("4", pattern=QUANTITY, description="cores of base, evaluate, export and deploy")
    evaluation_memory: str = Field("16Gi", pattern=QUANTITY, description="memory of such a task: the base once")
    training_hours: int = Field(
        72, gt=0, description="a try of a task that trains or decodes, or a job of `trainer`, is stopped after them"
    )
    gpu_type: str = Field("nvidia.com/gpu", description="resource name of the GPUs")
    gpu_count: int = Field(
        0, ge=0, description="GPUs of the pods of stage I and II; `trainer` takes num_processes a node"
    )
    evaluation_gpu_count: int = Field(0, ge=0, description="GPUs of the pods of base and evaluate: at most one is used")
    tolerations: tuple[dict[str, Any], ...] = Field(
        (), description="for pods that train or decode, besides NVIDIA's taint; where others have GPUs, for those alone"
    )
    node_selector: dict[str, str] = Field({}, description="labels of the nodes for them")
    queue: str = Field("", description="Kueue's queue for them; empty: none")
    training_backend: Backend = Field("process", description="how stage I and II run")
    num_processes: int = Field(1, gt=0, description="processes per node, one per GPU")
    num_nodes: int = Field(
        1, gt=0, description="nodes; more than one needs `trainer`, and the pipeline with the shared volume"
    )

    @property
    def launches(self) -> bool:
        """Whether stage I and II only launch a job of Kubeflow Trainer and wait for it."""
        return self.training_backend == "trainer"

    @property
    def has_gpus(self) -> bool:
        """Whether training or evaluation takes GPUs; then what takes none goes to other nodes."""
        return bool(self.gpu_count or self.evaluation_gpu_count or self.launches)

    def launch(self) -> dict[str, Any]:
        """The fields of `LaunchConfig` but the image; empty for one process. UserError as from that."""
        fields: dict[str, Any] = {
            "backend": self.training_backend, "num_processes": self.num_processes, "num_nodes": self.num_nodes,
        }  # fmt: skip
        LaunchConfig(**fields, image="any")
        if self.launches:
            resources = {self.gpu_type: self.num_processes, "cpu": self.training_cpu, "memory": self.training_memory}
            fields |= {"resources": resources, "tolerations": self.tolerations, "node_selector": self.node_selector}
            fields |= {"hours": self.training_hours, "queue": self.queue}
        return {} if self.training_backend == "process" else fields


def load_cluster(values: Mapping[str, Any] | None = None) -> Cluster:
    """The settings of the file that VISMEM_CLUSTER names, or of `values`, or the defaults.

    UserError for a file that is missing or no mapping, an unknown key or a value of the wrong type.
    """
    where = os.environ.get(VARIABLE, "") if values is None else ""
    if where and not Path(where).is_file():
        raise UserError(f"{VARIABLE} names {where}, and there is no such file")
    try:
        return Cluster.model_validate(load_params(Path(where)) if where else values or {})
    except ValidationError as error:
        said = []
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"]))
            unknown = fault["type"] == "extra_forbidden"
            said.append(
                f"unknown key '{key}'{nearest(key, Cluster.model_fields)}" if unknown else f"'{key}': {fault['msg']}"
            )
        raise UserError(f"{where or 'cluster'}: {'; '.join(said)}") from None
