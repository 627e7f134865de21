"""Stage II: memory invocation."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def stage2(
    parameters: dict,
    launch: dict,
    base: dsl.Input[dsl.Model],
    stage1: dsl.Input[dsl.Model],
    validate: dsl.Input[dsl.Dataset],
    stage2: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train when to invoke memory by GRPO, the formation frozen.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        launch: Processes and nodes, from `configure`; empty for a single process.
        base: The model of `base`.
        stage1: The model of `stage1`.
        validate: The clean shards of `validate`.
        stage2: Weights, curves, samples; metadata: model_sha256.
        metrics: Validation score of each way to decode, and what the training cost.
    """
    from vismem.kubeflow import run_task

    inputs = {"base": base, "stage1": stage1, "validate": validate}
    run_task("stage2", parameters, stage2, inputs, launch=launch, metrics=metrics)
