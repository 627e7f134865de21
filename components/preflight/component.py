"""Looks whether a run can reach its end, before it costs GPU time."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def preflight(parameters: dict, journal: str, report: dsl.Output[dsl.Markdown]):
    """Check secrets, buckets, registry, base model, GPUs, disk and shared memory; fail with all reasons at once.

    It sees what its own pod sees: give it the secrets, GPUs, node selector and /dev/shm of the training tasks.

    Args:
        parameters: The sections that it looks at, from `configure`.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        report: Table of the checks, for the run's page.
    """
    from vismem.orchestration import look_ahead

    look_ahead(parameters, report.path, journal)
