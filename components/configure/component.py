"""The parameters: a profile and overrides become one dictionary per task."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def configure(
    profile: str,
    overrides: dict,
    image: str,
    gpus: int,
    launches: bool,
    resolved: dsl.Output[dsl.Artifact],
) -> NamedTuple(
    "Parameters",
    [
        (task, dict)
        for task in (
            "preflight", "prepare", "validate", "base", "stage1", "stage2",
            "evaluate", "export", "register", "promote", "deploy",
        )
    ],
):  # fmt: skip
    """Resolve the run's parameters once; return for each task those that can change its output.

    Later ones win: defaults, profile, overrides. An unknown key fails the run at once, with the nearest right name.

    Args:
        profile: A profile of deploy/profiles; empty for none.
        overrides: Anything that params.yaml may hold, as sections or dotted keys, such as {"stage1.steps": 30}.
        image: Image of the tasks on a cluster, which must not have a tag that moves; empty outside a cluster.
        gpus: GPUs that `preflight` must see.
        launches: Whether stage I and II only launch a job of Kubeflow Trainer, whose nodes have the GPUs.
        resolved: All parameters in force, as a params.yaml with every description.
    """
    from vismem.kubeflow.parameters import configure

    return configure(profile, overrides, resolved.path, image, gpus, launches)
