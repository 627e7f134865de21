"""The parameters: a profile and overrides become one dictionary per task."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def configure(
    profile: str,
    overrides: dict,
    training_backend: str,
    num_processes: int,
    num_nodes: int,
    training_image: str,
    gpu_type: str,
    gpu_count: str,
    training_cpu: str,
    training_memory: str,
    tolerations: list,
    node_selector: dict,
    resolved: dsl.Output[dsl.Artifact],
) -> NamedTuple(
    "Parameters",
    [
        (task, dict)
        for task in (
            "preflight", "prepare", "validate", "base", "stage1", "stage2",
            "evaluate", "export", "register", "promote", "deploy", "launch",
        )
    ],
):  # fmt: skip
    """Resolve the run's parameters once; return for each task those that can change its output.

    Later ones win: defaults, profile, overrides. An unknown key fails the run at once, with the nearest right name.

    Args:
        profile: A profile of deploy/profiles; empty for none.
        overrides: Anything that params.yaml may hold, as sections or dotted keys, such as {"stage1.steps": 30}.
        training_backend: How stage I and II run: process, torchrun or trainer.
        num_processes: Their processes per node.
        num_nodes: Their nodes.
        training_image: Image of the nodes that `trainer` starts; empty outside a cluster.
        gpu_type: Resource name of the GPUs.
        gpu_count: GPUs of a training pod; `preflight` must see as many.
        training_cpu: Cores of a training pod.
        training_memory: Memory of a training pod.
        tolerations: Tolerations of a training pod.
        node_selector: Labels of the nodes for training.
        resolved: All parameters in force, as a params.yaml with every description.
    """
    from vismem.kubeflow.parameters import configure, launch_fields

    launch = launch_fields(
        training_backend, num_processes, num_nodes, training_image,
        gpu_type, training_cpu, training_memory, tolerations, node_selector,
    )  # fmt: skip
    return configure(profile, overrides, resolved.path, launch, int(gpu_count), bool(training_image))
