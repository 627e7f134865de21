"""Where a training step runs, and on what."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal, get_args

from pydantic.dataclasses import dataclass

from vismem.errors import UserError

QUEUE = "kueue.x-k8s.io/queue-name"  # the label that puts a job or a pod into a queue of Kueue
Backend = Literal["process", "torchrun", "trainer"]
BACKENDS = get_args(Backend)


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes share a step. The fields after `num_nodes` are read by `trainer` on a cluster only.

    `process`: this one. `torchrun`: `num_processes` on this machine. `trainer`: `num_processes` on each of `num_nodes`
    nodes through Kubeflow Trainer; without an `image`, on this machine through its local back end. UserError for a
    combination that is impossible. Values may come from JSON: floats become whole numbers again, lists tuples.
    """

    backend: str = "process"
    num_processes: int = 1  # per node: as many as it has GPUs
    num_nodes: int = 1
    image: str = ""  # contains this library; empty: no cluster
    runtime: str = "vismem-torch"  # the TrainingRuntime, or the ClusterTrainingRuntime
    shared: Path = Path("/shared")  # mount point of a volume that all nodes see, the same here and there
    claim: str = "vismem-shared"  # the PersistentVolumeClaim of that volume, ReadWriteMany
    resources: Mapping[str, str | int] = field(default_factory=dict)  # per node, cpu included; empty: the runtime's
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str | int], ...] = ()  # as Kubernetes writes them
    hours: float = 72.0  # a longer job is stopped
    queue: str = ""  # Kueue's; empty: none

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"backend '{self.backend}' is not known: choose one of {', '.join(BACKENDS)}")
        if self.num_processes < 1 or self.num_nodes < 1:
            counts = f"{self.num_nodes} nodes with {self.num_processes} processes each"
            raise UserError(f"{counts} were asked for: both numbers must be at least 1")
        if self.backend == "process" and (total := self.num_processes * self.num_nodes) > 1:
            raise UserError(f"backend 'process' is one process, and {total} were asked for: use 'torchrun'")
        if self.num_nodes > 1 and not (self.backend == "trainer" and self.image):
            raise UserError(f"{self.num_nodes} nodes need backend 'trainer' and an image")
        if self.resources and "cpu" not in self.resources:  # Trainer's SDK cannot read its own pods without
            raise UserError(f"resources {dict(self.resources)} do not say how many 'cpu' a node needs")
