"""The bundle: weights, ONNX graphs, model card, lineage, manifest."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def export(
    parameters: dict,
    base: dsl.Input[dsl.Model],
    stage2: dsl.Input[dsl.Model],
    validate: dsl.Input[dsl.Dataset],
    evaluate: dsl.Input[dsl.Artifact],
    export: dsl.Output[dsl.Model],
    card: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Bundle the model with card, lineage and manifest; with `export.graphs` also as ONNX, compared with torch.

    Args:
        parameters: The sections that tell how the model was made, from `configure`.
        export: The bundle; metadata: manifest_sha256, data_sha256, git_commit, parity.
        card: The model card.
        metrics: Questions that both engines answered, and how many of them alike.
    """
    from vismem.kubeflow.task import run_task

    run_task(
        parameters, export, metrics=metrics, report=card, base=base, stage2=stage2, validate=validate, evaluate=evaluate
    )
