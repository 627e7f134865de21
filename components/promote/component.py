"""The release: the version becomes champion, or is refused with reasons."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def promote(
    parameters: dict, journal: str, register: dsl.Input[dsl.Artifact], promote: dsl.Output[dsl.Artifact]
) -> str:
    """Make the version champion if the gate passed it. Returns 'promoted' or 'refused'; a refusal is no failure.

    Args:
        parameters: The sections that this step depends on, from `configure`.
        journal: Folder or s3:// address of the runs' journals; empty for none.
        register: Version and verdict of `register`.
        promote: release.json; metadata: name, version, model_id, promoted, reasons.
    """
    from vismem.orchestration import run_task

    made = run_task("promote", parameters, promote.path, {"register": register.path}, journal)
    promote.metadata.update(made.metadata)
    return "promoted" if made.metadata["promoted"] else "refused"
