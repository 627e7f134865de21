"""The questions: sources become Parquet shards."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def prepare(parameters: dict, journal: str, prepare: dsl.Output[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]):
    """Read the sources that the parameters name, or generate scenes, into Parquet shards a split.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        prepare: Shards and stats.json; metadata: data_sha256, seed, rows of each split.
        metrics: Rows of each split.
    """
    from vismem.orchestration import run_task

    made = run_task("prepare", parameters, prepare.path, {}, journal, metrics=metrics.path)
    prepare.metadata.update(made.metadata)
    for name, value in made.metrics.items():
        metrics.log_metric(name, value)
