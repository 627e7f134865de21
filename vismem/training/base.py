"""The step `base`: finds the vision-language model that goes in, checks it and keeps a copy with its fingerprint."""

import sys
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, AutoModelForImageTextToText

from vismem.config import Config
from vismem.errors import UserError
from vismem.files import write_json
from vismem.models.backbones import FAMILIES
from vismem.models.loading import no_weight_bars
from vismem.models.processors import load_processor
from vismem.progress import progress
from vismem.provenance import MANIFEST, sha256_folder, verify_manifest
from vismem.scope import Scope


def base(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write the base VLM to `out` in Hugging Face format, with its processor and `metrics.json`.

    Later steps read the copy, so they do not depend on where it came from. UserError for a model that cannot be found,
    differs from its manifest (where it has one), has no vision, or is of a family that VisMem has no file for.
    """
    name = config.base.model
    folder = config.base.folder()
    if folder is not None and (folder / MANIFEST).is_file() and (problems := verify_manifest(folder)):
        raise UserError(f"base.model '{name}' is not what its manifest says: {'; '.join(problems)}: restore {folder}")
    source = name if folder is None else str(folder)
    try:
        settings = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"base.model '{name}' is no model that can be loaded (hub id or folder): {error}") from None
    family = settings.model_type
    if getattr(settings, "vision_config", None) is None:
        raise UserError(f"base.model '{name}' ({family}) has no vision; supported: {', '.join(FAMILIES)}")
    if family not in FAMILIES:
        raise UserError(
            f"base.model '{name}' is of family '{family}', for which vismem/models/backbones has no file; "
            f"supported: {', '.join(FAMILIES)}"
        )
    with no_weight_bars(), progress("base", quiet=sys.stderr.isatty()):  # there the hub's own bar shows a download
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=config.base.dtype)
        model.save_pretrained(out)
        load_processor(source).save_pretrained(out)
    fingerprint, count = sha256_folder(out, "*.safetensors"), model.num_parameters()
    if folder is not None and (scope := Scope.read(folder)):
        scope.write(out)
    facts = {
        "model": name,
        "family": family,
        "parameters": count,
        "weights_sha256": fingerprint,
        "source_sha256": None if folder is None else sha256_folder(folder, "*.safetensors"),  # before it was copied
    }
    write_json(out / "metrics.json", facts)
    size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
    return f"base: {name}, {family} of {size} parameters, weights {fingerprint[:12]}, copied"
