"""Stage I: memory formation."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def stage1(
    parameters: dict,
    image: str,
    base: dsl.Input[dsl.Model],
    validate: dsl.Input[dsl.Dataset],
    stage1: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train query builder and memory formers: a supervised warm start, with the policy's LoRA, then GRPO without it.

    Args:
        stage1: Weights, curves, samples; metadata: model_sha256.
        metrics: Validation score of each way to decode, and what the training cost.
    """
    from vismem.kubeflow.task import run_task

    run_task(parameters, stage1, image=image, metrics=metrics, base=base, validate=validate)
