"""Looks whether a run can reach its end, before it costs GPU time."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def preflight(preflight: dict, base: dict, registry: dict, gpus: int, report: dsl.Output[dsl.Markdown]):
    """Check secrets, buckets, registry, base model, GPUs, disk and shared memory; fail with all reasons at once.

    It sees what its own pod sees: give it the secrets, GPUs, node selector and /dev/shm of the training tasks.

    Args:
        preflight: Parameters of the section `preflight`.
        base: Parameters of the section `base`.
        registry: Parameters of the section `registry`.
        gpus: CUDA devices that its pod must have, whatever the section says.
        report: Table of the checks, for the run's page.
    """
    from pathlib import Path

    from vismem import preflight as checks
    from vismem.config import parse_config

    config = parse_config({"preflight": {**preflight, "gpus": gpus}, "base": base, "registry": registry})
    checks.preflight(config, Path(report.path).parent, Path(report.path))
