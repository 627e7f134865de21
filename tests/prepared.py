"""Prepared data made by hand, the step `validate` run on it, and what it found."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vismem.config import Config, ValidateConfig
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.validation.validate import validate


def encoded(number: int, size: tuple[int, int] = (32, 32), kind: str = "PNG", **options: Any) -> bytes:
    """An image that looks like no other number's: 16 patches of colour."""
    file = io.BytesIO()
    patches = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).save(file, kind, **options)
    return file.getvalue()


def noise(size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((size, size), 90).save(file, "PNG")
    return file.getvalue()


def good(split: str, number: int) -> Sample:
    """A row that breaks no rule; its image is its own."""
    offset = {"train": 1000, "validation": 2000, "test": 3000}[split]
    return Sample(
        id=f"{split}-{number}",
        images=(encoded(offset + number),),
        question="Which?",
        answer="ab"[number % 2],
        choices=("a", "b"),
        task=("count", "find")[number % 2],
    )


def shards(folder: Path, **rows: Iterable[Sample]) -> Path:
    """Prepared data: 20 good rows a required split, unless given."""
    for split in ("train", "validation", "test"):
        standard = [good(split, n) for n in range(20)]
        write_shards(rows.get(split, standard), folder / "prepare" / split, rows_per_shard=8)
    return folder / "prepare"


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    """Validate what `shards` wrote; the verdicts by rule, with what was said of all."""
    out = folder / "validate"
    out.mkdir(exist_ok=True)
    config = Config(validate=ValidateConfig(**settings))
    validate(config, {"prepare": folder / "prepare"}, out)
    return verdicts(out)


def verdicts(out: Path) -> dict[str, Any]:
    found = json.loads((out / "validation.json").read_text())
    return found | {"rules": {rule["name"]: rule for rule in found["rules"]}}


def quarantined(folder: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted((folder / "validate" / "quarantine").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]


def broken_rules(found: dict[str, Any]) -> list[str]:
    return [name for name, rule in found["rules"].items() if not rule["success"]]


def stopped(folder: Path, said: str, **settings: Any) -> dict[str, Any]:
    """Run, expect the stop with its message, and return the verdicts that it left beside the report."""
    with pytest.raises(UserError, match=said) as caught:
        run(folder, **settings)
    report = folder / "validate" / "report.html"
    assert str(report) in str(caught.value)
    assert "The pipeline stops here" in report.read_text()
    assert not (folder / "validate" / "data").exists()
    found = verdicts(folder / "validate")
    assert found["success"] is False
    return found
