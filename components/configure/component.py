"""The parameters: profile, sections and overrides become one dictionary a task."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def configure(
    profile: str,
    overrides: dict,
    journal: str,
    environment: list,
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
    seed: int,
    prepare: dict,
    validate: dict,
    base: dict,
    memory: dict,
    invocation: dict,
    stage1: dict,
    stage2: dict,
    baselines: dict,
    evaluate: dict,
    export: dict,
    gate: dict,
    registry: dict,
    deploy: dict,
    study: dict,
    preflight: dict,
    resolved: dsl.Output[dsl.Artifact],
) -> NamedTuple(
    "Parameters",
    [
        ("preflight", dict),
        ("prepare", dict),
        ("validate", dict),
        ("base", dict),
        ("stage1", dict),
        ("stage2", dict),
        ("evaluate", dict),
        ("export", dict),
        ("register", dict),
        ("promote", dict),
        ("deploy", dict),
        ("launch", dict),
    ],
):
    """Resolve the run's parameters once; return for each task the sections that can change what it makes.

    What comes later wins: defaults, profile, sections where they differ from the defaults, overrides. An unknown key
    fails the run at once, with the nearest right name.

    Args:
        profile: A profile of deploy/profiles; empty for none.
        overrides: Single values by dotted key, such as {"stage1.steps": 30}.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        environment: Variables that `preflight` must find, besides those of its section.
        training_backend: How stage I and II run: process, torchrun or trainer.
        num_processes: Their processes on a node.
        num_nodes: Their nodes.
        training_image: Image of the nodes that `trainer` starts; empty: it works on this machine.
        gpu_type: Resource name of the GPUs.
        gpu_count: GPUs of a training pod; `preflight` must see as many.
        training_cpu: Cores of a training pod.
        training_memory: Memory of a training pod.
        tolerations: Tolerations of a training pod.
        node_selector: Labels of the nodes for training.
        seed: Seed of every random choice.
        prepare: Section `prepare` of params.yaml.
        validate: Section `validate` of params.yaml.
        base: Section `base` of params.yaml.
        memory: Section `memory` of params.yaml.
        invocation: Section `invocation` of params.yaml.
        stage1: Section `stage1` of params.yaml.
        stage2: Section `stage2` of params.yaml.
        baselines: Section `baselines` of params.yaml.
        evaluate: Section `evaluate` of params.yaml.
        export: Section `export` of params.yaml.
        gate: Section `gate` of params.yaml.
        registry: Section `registry` of params.yaml.
        deploy: Section `deploy` of params.yaml.
        study: Section `study` of params.yaml.
        preflight: Section `preflight` of params.yaml.
        resolved: All parameters in force, as a params.yaml with every description.
    """
    from vismem.orchestration import open_run

    sections = {
        "seed": seed,
        "prepare": prepare,
        "validate": validate,
        "base": base,
        "memory": memory,
        "invocation": invocation,
        "stage1": stage1,
        "stage2": stage2,
        "baselines": baselines,
        "evaluate": evaluate,
        "export": export,
        "gate": gate,
        "registry": registry,
        "deploy": deploy,
        "study": study,
        "preflight": preflight,
    }
    overrides = {"preflight.gpus": int(gpu_count), **overrides}
    launch = {
        "backend": training_backend,
        "num_processes": num_processes,
        "num_nodes": num_nodes,
        "image": training_image,
        "resources": {gpu_type: num_processes, "cpu": training_cpu, "memory": training_memory},
        "tolerations": tolerations,
        "node_selector": node_selector,
    }
    tasks = (
        "preflight", "prepare", "validate", "base", "stage1", "stage2",
        "evaluate", "export", "register", "promote", "deploy",
    )  # fmt: skip
    return open_run(tasks, profile, sections, overrides, launch, resolved.path, journal, environment)
