"""The exit task: how the run ended."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def summary(status: dsl.PipelineTaskFinalStatus, summary: dsl.Output[dsl.Markdown]):
    """Write the run's summary, whatever happened before.

    Args:
        status: The run's state and error message, from Kubeflow.
        summary: The outcome in plain words, and what to do after a failure.
    """
    from vismem.kubeflow.results import write_summary

    print(write_summary(summary.path, status.state or "", status.error_message or ""))
