"""Where a step of training runs, and with what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vismem.errors import UserError

BACKENDS = ("process", "accelerate", "trainer")


@dataclass(frozen=True)
class How:
    """How many processes a step is shared among. What follows `num_nodes` matters to `trainer` on a cluster only.

    `process`: this one. `accelerate`: `num_processes` of this machine. `trainer`: `num_processes` on each of
    `num_nodes` nodes through Kubeflow Trainer; without an `image`, on this machine through its local back end.
    UserError for a combination that cannot be. Fields may come out of JSON, where whole numbers became floats and
    tuples lists: they get their types back.
    """

    backend: str = "process"
    num_processes: int = 1  # of a node: as many as it has GPUs
    num_nodes: int = 1
    image: str = ""  # holds this library; empty: no cluster
    namespace: str = "vismem"
    runtime: str = "vismem-torch"  # the TrainingRuntime, or the ClusterTrainingRuntime
    shared: Path = Path("/shared")  # where a volume that all nodes see is mounted, here and there
    claim: str = "vismem-shared"  # the PersistentVolumeClaim of that volume, ReadWriteMany
    resources: Mapping[str, str | float] = field(default_factory=dict)  # of a node, cpu included; empty: the runtime's
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()  # as Kubernetes writes them
    hours: float = 72.0  # after which a job is given up

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, _whole(value))
        object.__setattr__(self, "tolerations", tuple(self.tolerations))
        if self.backend not in BACKENDS:
            raise UserError(f"backend '{self.backend}' is not known: choose one of {', '.join(BACKENDS)}")
        if self.num_processes < 1 or self.num_nodes < 1:
            raise UserError(f"{self.num_nodes} nodes of {self.num_processes} processes are too few: 1 at least")
        if self.backend == "process" and self.world_size > 1:
            raise UserError(f"backend 'process' is one process, and {self.world_size} were asked for: use 'accelerate'")
        if self.num_nodes > 1 and not (self.backend == "trainer" and self.image):
            raise UserError(f"{self.num_nodes} nodes need backend 'trainer' and an image")
        if self.resources and "cpu" not in self.resources:  # Trainer's SDK cannot read its own pods without
            raise UserError(f"resources {dict(self.resources)} do not say how many 'cpu' a node needs")

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.num_processes * self.num_nodes


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
