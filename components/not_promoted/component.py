"""What is left to say where the gate refuses a version."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def not_promoted(journal: str, promote: dsl.Input[dsl.Artifact], note: dsl.Output[dsl.Markdown]):
    """Say which version was refused, and why. Nothing is deployed; what is served stays as it is.

    Args:
        journal: Folder or s3:// address of the runs' journals; empty for none.
        promote: The refusal of `promote`.
        note: Version and reasons.
    """
    from vismem.orchestration import refusal_note

    refusal_note(promote.path, note.path, journal)
