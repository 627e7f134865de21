"""How a folder of what VisMem adds refers to the base that it was trained on."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vismem.config import DEFAULT_BASE
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.hub import fetch
from vismem.provenance import sha256_folder
from vismem.shipped import shipped

REFERENCE = "base.json"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Base:
    """A base as a folder refers to it: a hub id, what comes with VisMem, or a folder; `sha256` of its weights."""

    model: str
    sha256: str | None = None  # None: any will do
    revision: str | None = None  # the hub's commit; None: the newest

    @property
    def everywhere(self) -> bool:
        """Whether other machines find it too."""
        return self.model == DEFAULT_BASE or bool(HUB_ID.fullmatch(self.model) and not Path(self.model).is_dir())

    @classmethod
    def read(cls, folder: Path) -> "Base | None":
        """The reference in a folder of what VisMem adds; None: it has none. UserError for a damaged one."""
        if not (folder / REFERENCE).is_file():
            return None
        named = read_json(folder / REFERENCE)
        try:
            return cls(named["model"], named["weights_sha256"], named.get("revision"))
        except (LookupError, TypeError):
            raise UserError(f"{folder / REFERENCE} is damaged: it lacks model or weights_sha256") from None

    @classmethod
    def of_step(cls, folder: Path) -> "Base":
        """Where the copy that the step `base` wrote came from."""
        facts = read_json(folder / "metrics.json", "run `vismem base` again")
        return cls(facts["model"], facts["source_sha256"], facts.get("source_revision"))

    def write(self, folder: Path) -> None:
        """Write the reference into the folder of what VisMem adds."""
        revision = {"revision": self.revision} if self.revision else {}
        write_json(folder / REFERENCE, {"model": self.model, "weights_sha256": self.sha256, **revision})

    def place(self, beside: Path = Path()) -> str | Path:
        """What to load: a hub id or a folder. `beside` is the folder that refers to it.

        UserError where it is not on this machine, or has other weights.
        """
        folder = next((path for path in (beside / self.model, Path(self.model)) if path.is_dir()), None)
        if folder is None and self.model == DEFAULT_BASE:
            folder = shipped(DEFAULT_BASE)
        why = ""
        if folder is None and self.sha256 is None and HUB_ID.fullmatch(self.model):
            return self.model
        if folder is None and HUB_ID.fullmatch(self.model):
            try:
                folder = fetch(self.model, self.revision)
            except UserError as error:  # a folder's name may look like one of the hub
                why = f"; {error}"
                with suppress(UserError):  # the newest, or the one in the cache, may have the same weights
                    folder = fetch(self.model) if self.revision else None
        if folder is None:
            raise UserError(f"the base '{self.model}' is not on this machine: say where it is with base= (--base){why}")
        if self.sha256 and (sha256_folder(folder, WEIGHTS) != self.sha256 or _reads_elsewhere(folder)):
            raise UserError(
                f"{folder} has other weights than the base that the memory was trained on: give that one{why}"
            )
        return folder


def _reads_elsewhere(folder: Path) -> bool:
    """Whether transformers would load weights that are none of WEIGHTS, by an index, a configuration or an adapter."""
    names = [name for file in folder.glob("*.index.json") for name in read_json(file).get("weight_map", {}).values()]
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    adapter = (folder / "adapter_config.json").is_file()  # which it loads where peft is installed
    return adapter or any("/" in str(name) for name in names) or "transformers_weights" in settings
