"""What comes with VisMem beside its code: in a wheel below `vismem/shipped/`, in a checkout at the root."""

from pathlib import Path


def shipped(relative: str) -> Path:
    """The path of a file or folder that comes with VisMem, named as in the repository: "assets/tiny-vlm"."""
    package = Path(__file__).parent
    inside = package / "shipped"
    return (inside if inside.is_dir() else package.parent) / relative
