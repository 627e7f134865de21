"""The base model: built and trained here, or resolved from a hub id or a path."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def base(
    parameters: dict,
    validate: dsl.Input[dsl.Dataset],
    base: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Make the base vision-language model, in Hugging Face format.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        validate: The clean shards of `validate`.
        base: The model; metadata: model_sha256, model_type.
        metrics: Figures of its training, where it was trained here.
    """
    from vismem.kubeflow import run_task

    run_task("base", parameters, base, {"validate": validate}, metrics=metrics)
