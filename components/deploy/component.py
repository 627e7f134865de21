"""The service: a Triton model repository with the champion, smoke-tested over gRPC."""

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
    """Write the champion's Triton model repository and ask it real questions on a real server.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        export: The bundle of `export`.
        promote: The release of `promote`.
        validate: The clean shards of `validate`, whose test questions are asked.
        deploy: model_repository/ and smoke.json; metadata: model, version, repository_sha256.
        metrics: Times to the first token and to the whole answer, in milliseconds.
    """
    from vismem.kubeflow import run_task

    inputs = {"export": export, "promote": promote, "validate": validate}
    run_task("deploy", parameters, deploy, inputs, metrics=metrics)
