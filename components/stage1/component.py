"""Stage I: memory formation."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def stage1(
    parameters: dict,
    journal: str,
    launch: dict,
    base: dsl.Input[dsl.Model],
    validate: dsl.Input[dsl.Dataset],
    stage1: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train query builder and memory formers by GRPO, the policy frozen.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        launch: Processes and nodes, the fields of `vismem.launch.LaunchConfig`; empty for this process alone.
        base: The model of `base`.
        validate: The clean shards of `validate`.
        stage1: Weights, curves, samples; metadata: model_sha256.
        metrics: Validation score of each way to decode, and what the training cost.
    """
    from vismem.orchestration import run_task

    inputs = {"base": base.path, "validate": validate.path}
    made = run_task("stage1", parameters, stage1.path, inputs, journal, launch, metrics=metrics.path)
    stage1.metadata.update(made.metadata)
    for name, value in made.metrics.items():
        metrics.log_metric(name, value)
