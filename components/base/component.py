"""The base model, resolved from a folder or a hub id."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def base(parameters: dict, base: dsl.Output[dsl.Model], metrics: dsl.Output[dsl.Metrics]):
    """Check and copy the base vision-language model, in Hugging Face format.

    Args:
        base: The model; metadata: model_sha256, model_type.
        metrics: Its number of parameters.
    """
    from vismem.kubeflow.task import run_task

    run_task(parameters, base, metrics=metrics)
