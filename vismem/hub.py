"""The Hugging Face hub: fetching a model; sharing a trained one: its card, code for transformers, and the upload."""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from vismem.config import DEFAULT_BASE
from vismem.errors import UserError, first_line
from vismem.files import write_json, write_text

CARD = "README.md"
OTHER_FORMATS = [".gitattributes", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "original/*"]  # of weights
PICTURE = re.compile(r'<img src="([\w.-]+)"')  # one beside the card
NEW_CARD = """---
library_name: vismem
pipeline_tag: image-text-to-text
tags: [latent-memory, visual-question-answering]
{base_model}---

# VisMem on {base}

Latent vision memory (VisMem, arXiv 2511.11007) for `{base}`. It has not been evaluated.

```python
from vismem import VisMem

model = VisMem.from_pretrained("THIS REPOSITORY OR FOLDER")
print(model.answer("photo.png", "what is in the picture?").marked)
```

`manifest.json` holds the sha256 of every file.
"""


def read_card(added: Path) -> dict[str, bytes]:
    """The card of a folder of what VisMem adds, or of the bundle around it, and its pictures, by name; of none, {}."""
    folder = added.parent if added.name == "vismem" else added
    card = folder / CARD
    if not card.is_file():
        return {}
    pictures = [folder / name for name in PICTURE.findall(card.read_text())]
    return {file.name: file.read_bytes() for file in (card, *pictures) if file.is_file()}


def write_card(folder: Path, card: Mapping[str, bytes], base: str) -> None:
    """Write the card and its pictures, or where there is none, a card that says how to load the model."""
    named = f"base_model: {base}\n" if base not in (DEFAULT_BASE, "base") else ""
    for name, data in (card or {CARD: NEW_CARD.format(base=base, base_model=named).encode()}).items():
        (folder / name).write_bytes(data)


def write_code(folder: Path) -> None:
    """Write what makes transformers' Auto classes find `vismem.automodel` from a saved folder."""
    names = {"AutoConfig": "VisMemConfig", "AutoModelForImageTextToText": "VisMemForAnswers"}
    auto_map = {name: f"modeling_vismem.{target}" for name, target in names.items()}
    write_json(folder / "config.json", {"model_type": "vismem", "auto_map": auto_map})
    write_text(folder / "modeling_vismem.py", f"from vismem.automodel import {', '.join(names.values())}\n")


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a model repository, fetched unless it is in the cache. UserError where there is none.

    `revision`: a commit; None: the newest.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:  # ValueError: no name of the hub's; all others are OSErrors
        raise UserError(f"no folder {name}, and no model '{name}' from the hub ({first_line(error)})") from None


def commit_of(folder: Path) -> str | None:
    """The commit of a folder that `fetch` has returned; None for any other."""
    return folder.name if folder.parent.name == "snapshots" else None


def push(save: Callable[[Path], None], repo_id: str, private: bool | None, token: str | None) -> str:
    """Upload what `save` writes into a folder to a model repository, which is made if need be; returns its URL.

    UserError where the hub does not answer or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever httpx it is built on

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a model with VisMem")
        except (HTTPError, OSError, ValueError) as error:
            raise UserError(
                f"the hub did not take '{repo_id}' ({first_line(error)}): `hf auth login` names an account"
            ) from None
    return str(url)
