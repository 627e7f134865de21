"""The service, smoke-tested: a Triton model repository with the champion, or `vismem api` where it has no graphs."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def deploy(
    parameters: dict,
    export: dsl.Input[dsl.Model],
    promote: dsl.Input[dsl.Artifact],
    validate: dsl.Input[dsl.Dataset],
    deploy: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write the champion's Triton model repository, if it has graphs, and ask it real questions on a real server.

    Args:
        deploy: smoke.json, with graphs Triton's model_repository/; metadata: model, version, manifest_sha256.
        metrics: Times to the first token and to the whole answer, in milliseconds.
    """
    from vismem.kubeflow.task import run_task

    run_task(parameters, deploy, metrics=metrics, export=export, promote=promote, validate=validate)
