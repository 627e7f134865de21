"""The questions: sources become Parquet shards."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def prepare(parameters: dict, prepare: dsl.Output[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]):
    """Read the sources that the parameters name, or generate scenes, into Parquet shards a split.

    Args:
        prepare: Shards and stats.json; metadata: data_sha256, seed, rows of each split.
        metrics: Rows of each split.
    """
    from vismem.kubeflow.task import run_task

    run_task(parameters, prepare, metrics=metrics)
