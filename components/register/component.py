"""The registry: a run and a model version in MLflow, judged by the gate."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def register(
    parameters: dict,
    export: dsl.Input[dsl.Model],
    evaluate: dsl.Input[dsl.Artifact],
    validate: dsl.Input[dsl.Dataset],
    register: dsl.Output[dsl.Artifact],
    verdict: dsl.Output[dsl.Markdown],
):
    """Register the bundle in MLflow as challenger and judge it. A refusal by the gate is a result, not a failure.

    Args:
        parameters: All sections, from `configure`.
        export: The bundle of `export`.
        evaluate: The figures of `evaluate`.
        validate: The clean shards and verdicts of `validate`.
        register: version.json and verdict.json; metadata: name, version, run_id, model_id, manifest_sha256, verdict.
        verdict: Every rule of the gate with its figures.
    """
    from vismem.kubeflow import run_task

    inputs = {"export": export, "evaluate": evaluate, "validate": validate}
    run_task("register", parameters, register, inputs, report=verdict)
