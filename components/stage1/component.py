"""Stage I: memory formation."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def stage1(
    parameters: dict,
    launch: dict,
    base: dsl.Input[dsl.Model],
    validate: dsl.Input[dsl.Dataset],
    stage1: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train query builder and memory formers by GRPO, the policy frozen.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        launch: Processes and nodes, from `configure`; empty for a single process.
        base: The model of `base`.
        validate: The clean shards of `validate`.
        stage1: Weights, curves, samples; metadata: model_sha256.
        metrics: Validation score of each way to decode, and what the training cost.
    """
    from vismem.kubeflow import run_task

    inputs = {"base": base, "validate": validate}
    run_task("stage1", parameters, stage1, inputs, launch=launch, metrics=metrics)
