"""The registry: a run and a model version in MLflow, judged by the gate."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def register(
    parameters: dict,
    image: str,
    run: str,
    export: dsl.Input[dsl.Model],
    evaluate: dsl.Input[dsl.Artifact],
    validate: dsl.Input[dsl.Dataset],
    register: dsl.Output[dsl.Artifact],
    verdict: dsl.Output[dsl.Markdown],
):
    """Register the bundle in MLflow as challenger and judge it. A refusal by the gate is a result, not a failure.

    Args:
        parameters: All sections, from `configure`.
        image: Image of the tasks, a tag of the version; empty outside a cluster.
        run: Id of the pipeline's run, a tag of the version; empty outside a cluster.
        register: version.json and verdict.json; metadata: name, version, run_id, model_id, manifest_sha256, verdict.
        verdict: Every rule of the gate with its figures.
    """
    from vismem.kubeflow.task import run_task

    inputs = {"export": export, "evaluate": evaluate, "validate": validate}
    run_task(parameters, register, image=image, run=run, report=verdict, **inputs)
