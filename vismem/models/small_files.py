"""The small files of a base, a folder or a hub id: read without its weights, and without transformers."""

import logging
from pathlib import Path
from typing import Any

from vismem.config import BaseConfig
from vismem.errors import UserError
from vismem.files import read_json


def small_file(config: BaseConfig, name: str) -> Path:
    """A small file of `base.model`; OSError where it is not to be had, UserError where there is no such model."""
    folder = config.folder()
    if folder is not None:
        if (folder / name).is_file():
            return folder / name
        raise FileNotFoundError(f"{folder} has no {name}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it warns at each of its tries
    try:
        return Path(hf_hub_download(config.model, name))
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(
            f"no folder '{config.model}', and no model of that name on the hub (or it asks for a login: "
            "`hf auth login`): base.model or --base takes a model's folder or a hub id"
        ) from None
    except HfHubHTTPError as error:  # no such file, or no access to it
        raise OSError(str(error)) from None


def read_small(config: BaseConfig, name: str) -> dict[str, Any]:
    """A JSON file of `base.model`; errors as of `small_file`."""
    values: dict[str, Any] = read_json(small_file(config, name))
    return values


def read_tokenizer(config: BaseConfig) -> Any:
    """The tokenizer of `base.model` (tokenizers.Tokenizer); errors as of `small_file`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(small_file(config, "tokenizer.json")))
