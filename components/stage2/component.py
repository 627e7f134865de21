"""Stage II: memory invocation."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def stage2(
    parameters: dict,
    image: str,
    base: dsl.Input[dsl.Model],
    stage1: dsl.Input[dsl.Model],
    validate: dsl.Input[dsl.Dataset],
    stage2: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train when to invoke memory by GRPO, the formation frozen.

    Args:
        stage2: Weights, curves, samples; metadata: model_sha256.
        metrics: Validation score of each way to decode, and what the training cost.
    """
    from vismem.kubeflow.task import run_task

    run_task(parameters, stage2, image=image, metrics=metrics, base=base, stage1=stage1, validate=validate)
