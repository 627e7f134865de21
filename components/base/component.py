"""The base model: built and trained here, or resolved from a hub id or a path."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def base(
    parameters: dict,
    journal: str,
    validate: dsl.Input[dsl.Dataset],
    base: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Make the base vision-language model, in Hugging Face format.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        validate: The clean shards of `validate`.
        base: The model; metadata: model_sha256, model_type.
        metrics: Figures of its training, where it was trained here.
    """
    from vismem.orchestration import run_task

    made = run_task("base", parameters, base.path, {"validate": validate.path}, journal, metrics=metrics.path)
    base.metadata.update(made.metadata)
    for name, value in made.metrics.items():
        metrics.log_metric(name, value)
