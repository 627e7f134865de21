"""The registry: a run and a model version in MLflow, judged by the gate."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def register(
    parameters: dict,
    journal: str,
    export: dsl.Input[dsl.Model],
    evaluate: dsl.Input[dsl.Artifact],
    validate: dsl.Input[dsl.Dataset],
    register: dsl.Output[dsl.Artifact],
    verdict: dsl.Output[dsl.Markdown],
):
    """Register the bundle in MLflow as challenger and judge it. A refusal by the gate is a result, not a failure.

    Args:
        parameters: All sections, from `configure`.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        export: The bundle of `export`.
        evaluate: The figures of `evaluate`.
        validate: The clean shards and verdicts of `validate`.
        register: version.json and verdict.json; metadata: name, version, run_id, model_id, manifest_sha256, verdict.
        verdict: Every rule of the gate with its figures.
    """
    from vismem.orchestration import run_task, verdict_page

    inputs = {"export": export.path, "evaluate": evaluate.path, "validate": validate.path}
    made = run_task("register", parameters, register.path, inputs, journal)
    register.metadata.update(made.metadata)
    with open(verdict.path, "w") as page:
        page.write(verdict_page(register.path))
