"""The release: the version becomes champion, or is refused with reasons."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def promote(
    parameters: dict,
    register: dsl.Input[dsl.Artifact],
    promote: dsl.Output[dsl.Artifact],
    note: dsl.Output[dsl.Markdown],
) -> str:
    """Make the version champion if the gate passed it. Returns 'promoted' or 'refused'; a refusal is no failure.

    Args:
        promote: release.json; metadata: name, version, model_id, promoted, reasons.
        note: Version, outcome and reasons.
    """
    from vismem.kubeflow.task import run_task

    run_task(parameters, promote, report=note, register=register)
    return "promoted" if promote.metadata["promoted"] else "refused"
