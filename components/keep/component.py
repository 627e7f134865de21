"""The end of a run that the gate refused: nothing is deployed."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def keep():
    """Say that the served model stays as it is; the page of `promote` has the reasons."""
    print("not promoted: nothing is deployed, and the served model stays as it is")
