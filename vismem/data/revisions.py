"""Where data that DVC keeps came from: `revisions.json` of `prepare` and `validate`, and a bundle's lineage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismem.files import read_json, write_json
from vismem.records import Part

REVISIONS = "revisions.json"


class DataRevision(Part):
    """Data as DVC keeps it: enough to fetch the same bytes again."""

    repo: str  # URL; of a folder that has none, its name
    rev: str  # as it was asked for; nothing for data of the project itself
    commit: str  # of the repository
    path: str  # in the repository
    md5: str  # as DVC has it; of a folder it ends with .dir
    remote: str  # URL of the DVC remote; nothing where there is none


def write_revisions(folder: Path, revisions: Sequence[DataRevision]) -> None:
    """Write the file into the folder of a step's output."""
    write_json(folder / REVISIONS, {"revisions": [revision.model_dump() for revision in revisions]})


def read_revisions(folder: Path) -> tuple[DataRevision, ...]:
    """Those that a step's output names; none where it is older than the file."""
    return revisions_of(read_json(folder / REVISIONS)) if (folder / REVISIONS).is_file() else ()


def revisions_of(values: Mapping[str, Any]) -> tuple[DataRevision, ...]:
    """Those in the plain values of that file or of a lineage; none where that is older than the field."""
    return tuple(DataRevision(**revision) for revision in values.get("revisions", ()))


def revision_tags(revisions: Sequence[DataRevision]) -> dict[str, str]:
    """Data revisions as texts, `data_rev`, `data_md5` and so on, with commas between those of several sources."""
    fields = {name: [getattr(revision, name) for revision in revisions] for name in DataRevision.model_fields}
    return {f"data_{name}": ", ".join(values) for name, values in fields.items() if any(values)}
