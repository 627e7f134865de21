"""The step `base`: finds the vision-language model that goes in, checks it and keeps it with its fingerprint."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from vismem.config import Config
from vismem.errors import UserError, first_line
from vismem.files import link_or_copy, read_json, write_json
from vismem.hub import commit_of, fetch
from vismem.models.backbones import FAMILIES
from vismem.models.loading import DAMAGED, check_processor, no_weight_bars
from vismem.models.processors import load_processor
from vismem.progress import progress
from vismem.provenance import MANIFEST, sha256_folder, verify_manifest
from vismem.scope import Scope

TYPES = {"float32": "F32", "bfloat16": "BF16"}  # as safetensors names them
INDEX = "model.safetensors.index.json"  # names the files of weights that are in several


def base(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write the base VLM to `out` in Hugging Face format, with its processor and `metrics.json`.

    Later steps read it there, so they do not depend on where it came from. Its weights are hard links where they have
    the type `base.dtype` and lie on the same disk, so that they take no room; else they are copied. UserError for a
    model that cannot be found, differs from its manifest (where it has one), lacks weights, has no vision, or is of a
    family that VisMem has no file for.
    """
    name = config.base.model
    folder = config.base.folder()
    if folder is not None and (folder / MANIFEST).is_file() and (problems := verify_manifest(folder)):
        raise UserError(f"base.model '{name}' is not what its manifest says: {'; '.join(problems)}: restore {folder}")
    try:
        settings = AutoConfig.from_pretrained(name if folder is None else str(folder), trust_remote_code=False)
    except (*DAMAGED, OSError) as error:
        raise UserError(f"base.model '{name}' is no model that can be loaded (hub id or folder): {error}") from None
    family = settings.model_type
    if getattr(settings, "vision_config", None) is None:
        raise UserError(f"base.model '{name}' ({family}) has no vision; supported: {', '.join(FAMILIES)}")
    if family not in FAMILIES:
        raise UserError(
            f"base.model '{name}' is of family '{family}', for which vismem/models/backbones has no file; "
            f"supported: {', '.join(FAMILIES)}"
        )
    source = fetch(name) if folder is None else folder
    with no_weight_bars(), progress("base", quiet=sys.stderr.isatty()):  # there the hub's own bar shows a download
        with _whole(name):
            processor = load_processor(source)
        check_processor(processor, settings, name)
        count, how = _write(source, out, config.base.dtype, name)
        processor.save_pretrained(out)
    fingerprint = sha256_folder(out, "*.safetensors")
    if folder is not None and (scope := Scope.read(folder)):
        scope.write(out)
    facts = {
        "model": name,
        "family": family,
        "parameters": count,
        "weights_sha256": fingerprint,
        "source_sha256": sha256_folder(source, "*.safetensors"),  # before it was copied
    }
    if folder is None and (commit := commit_of(source)):
        facts["source_revision"] = commit
    write_json(out / "metrics.json", facts)
    size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
    return f"base: {name}, {family} of {size} parameters, weights {fingerprint[:12]}, {how}"


@contextmanager
def _whole(name: str) -> Iterator[None]:
    """A block in which what a damaged file raises where it is read is a UserError."""
    try:
        yield
    except DAMAGED as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"base.model '{name}' is damaged ({said}): fetch it again") from None


def _write(source: Path, out: Path, dtype: str, name: str) -> tuple[int, str]:
    """Write the model of the folder `source` in a precision; how many parameters it has, and how they came to `out`."""
    with _whole(name):
        if not (files := _weight_files(source)):
            raise UserError(f"{source} has no weights as safetensors: save it with transformers' save_pretrained")
        # without its weights, which need not be in memory to be linked
        load = partial(AutoModelForImageTextToText.from_pretrained, source, trust_remote_code=False)
        model, found = load(device_map="meta", output_loading_info=True)
        other = any(kind != TYPES[dtype] for file in files for kind in _types(file))
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{source} lacks weights of the model: {', '.join(missing[:3])}: fetch or save it again")
    if other:
        load(dtype=dtype).save_pretrained(out)
        return model.num_parameters(), f"copied as {dtype}"
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    for file in (*files, *source.glob(INDEX)):
        link_or_copy(file, out / file.name)
    return model.num_parameters(), "linked" if files[0].resolve().samefile(out / files[0].name) else "copied"


def _weight_files(source: Path) -> list[Path]:
    """The safetensors files that hold the model's weights; none where there are none."""
    if (source / INDEX).is_file():
        weights: dict[str, Any] = read_json(source / INDEX)["weight_map"]
        return [source / name for name in sorted(set(weights.values()))]
    return [*source.glob("model.safetensors")]


def _types(file: Path) -> set[str]:
    """The types of the tensors in a file; none of their values are read."""
    with safe_open(file, framework="pt") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
