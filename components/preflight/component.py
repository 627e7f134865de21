"""Checks that a run can complete, before it costs GPU time."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def preflight(parameters: dict, report: dsl.Output[dsl.Markdown]):
    """Check secrets, buckets, registry, base, GPUs, memory, disk and shared volume; fail with all reasons at once.

    It sees what its own pod sees: give it the secrets, GPUs, node selector and /dev/shm of the training tasks.

    Args:
        parameters: All sections, from `configure`.
        report: Table of the checks, for the run's page.
    """
    from vismem.kubeflow.task import run_preflight

    run_preflight(parameters, report)
