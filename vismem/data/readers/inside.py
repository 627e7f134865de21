"""The files that data names: only those inside their source's folder are read."""

from pathlib import Path

from vismem.errors import UserError


def inside(folder: Path, path: Path, where: str) -> Path:
    """`path`, a file or folder that the data names at `where`, once links and `..` are followed.

    UserError if it is outside `folder`, whether or not it is there.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise UserError(f"{where}: {str(path)!r} is no path: {error}") from None
    if not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"{where}: {path} leads to {target}, outside the source's folder {folder}: copy the file into that folder, "
            "only what is inside is read"
        )
    return target
