"""The base model, resolved from a folder or a hub id."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def base(
    parameters: dict,
    journal: str,
    base: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Check and copy the base vision-language model, in Hugging Face format.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        base: The model; metadata: model_sha256, model_type.
        metrics: Its number of parameters.
    """
    from vismem.orchestration import run_task

    made = run_task("base", parameters, base.path, {}, journal, metrics=metrics.path)
    base.metadata.update(made.metadata)
    for name, value in made.metrics.items():
        metrics.log_metric(name, value)
