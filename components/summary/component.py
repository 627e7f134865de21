"""The run's end: what every task made, or why it failed."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def summary(journal: str, status: dsl.PipelineTaskFinalStatus, summary: dsl.Output[dsl.Markdown]):
    """Write the run's summary, whatever happened before.

    Args:
        journal: Folder or s3:// address of the runs' journals; empty for none.
        status: How the run ended, from the pipeline.
        summary: A line a task, and the reasons of what failed.
    """
    from vismem.orchestration import close_run

    print(close_run(summary.path, journal, status.state or "", status.error_message or ""))
