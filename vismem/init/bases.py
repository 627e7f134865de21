"""What a base model takes, from its small files only: its family, its tokenizer, the pictures that it sees unchanged.

No weights are read, and nothing of transformers is imported.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vismem.config import BaseConfig
from vismem.errors import UserError
from vismem.files import read_json
from vismem.init.rows import Row

SMALL_WIDTH = 512  # hidden size below which a base trains on a CPU, with the settings of params.yaml
SMALL_ASPECT = 2.0  # width to height, or height to width, that such a base has learnt; see assets/tiny-vlm/README.md
CHARS_PER_TOKEN = 3  # of a tokenizer that could not be loaded; few languages need more tokens


@dataclass(frozen=True)
class Base:
    """What is known of the model that goes in. `unknown` says why the rest is not; empty where it is."""

    model: str  # as `base.model` has it
    small: bool  # whether a CPU can train it
    tokenizer: Any = None  # tokenizers.Tokenizer
    pixels: tuple[int, int] | None = None  # area between which a picture is seen as it is
    exports: bool = True  # whether its family can be exported and served
    unknown: str = ""

    def longest(self, texts: Iterable[str]) -> int:
        """How many tokens the longest text has; without a tokenizer a guess that is rather too high."""
        if self.tokenizer is None:
            return max(len(text) // CHARS_PER_TOKEN + 1 for text in texts)
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return max(len(one.ids) for one in encoded)

    def cannot_read(self, rows: Sequence[Row]) -> list[str]:
        """What of the rows the base does not see or know as it is, one sentence each."""
        return [*self._sizes(rows), *self._aspects(rows), *self._words(rows)]

    def _sizes(self, rows: Sequence[Row]) -> Iterable[str]:
        sizes = Counter(size for row in rows for size in row.sides)
        if self.pixels is None or not sizes:
            return
        low, high = self.pixels
        for what, limit, seen, outside in (
            ("large", high, "shrunk", {size: n for size, n in sizes.items() if math.prod(size) > high}),
            ("small", low, "enlarged", {size: n for size, n in sizes.items() if math.prod(size) < low}),
        ):
            if outside:
                width, height = (max if what == "large" else min)(outside, key=math.prod)
                scale = math.sqrt(limit / (width * height))
                yield (
                    f"{sum(outside.values())} of {sizes.total()} images are too {what} for the base, which sees "
                    f"{low:,} to {high:,} pixels (84 x 84 are 7,056): they are {seen}, one of {width} x {height} to "
                    f"about {width * scale:.0f} x {height * scale:.0f}"
                    + ("; what is not to be recognised then is lost: cut out what matters" if what == "large" else "")
                )

    def _aspects(self, rows: Sequence[Row]) -> Iterable[str]:
        if self.small and (long := [s for row in rows for s in row.sides if max(s) > SMALL_ASPECT * min(s)]):
            width, height = max(long, key=lambda size: max(size) / min(size))
            total = sum(len(row.sides) for row in rows)
            yield (
                f"{len(long)} of {total} images are more than {SMALL_ASPECT:g} times as long on one side as on the "
                f"other, such as {width} x {height}: the base has learnt none like that"
            )

    def _words(self, rows: Sequence[Row]) -> Iterable[str]:
        """Words that a small base has never read: its tokenizer cuts them into pieces."""
        if not self.small or self.tokenizer is None:
            return
        used = Counter(word for row in rows for word in re.findall(r"[^\W\d_]+", f"{row.question} {row.target}"))
        known = partial(_is_known, self.tokenizer.get_vocab(with_added_tokens=False))
        strange = [word for word, _ in used.most_common() if not known(word)]
        if strange:
            shown = ", ".join(f"'{word}'" for word in strange[:5])
            yield (
                f"{len(strange)} of {len(used)} words are not in the base's vocabulary, such as {shown}: it spells "
                "them and does not know what they mean"
            )


def _is_known(vocabulary: dict[str, int], word: str) -> bool:
    """Whether a byte-level vocabulary has the word whole, inside a sentence or at its start."""
    return f"Ġ{word}" in vocabulary or word in vocabulary or len(word) == 1


def look_at(config: BaseConfig) -> Base:
    """What is known of `base.model`, a folder or a hub id. UserError for what is no vision-language model.

    A hub that cannot be reached is no error: the model is then taken for a large one.
    """
    folder = config.folder()
    if folder is None and Path(config.model).is_absolute():
        raise UserError(f"no folder {config.model}: --base takes a model's folder or a hub id")
    try:
        settings = _read(config.model, folder, "config.json")
    except OSError as error:
        why = str(error).strip().splitlines()[0]
        return Base(
            config.model,
            small=False,
            unknown=f"{config.model} cannot be looked at ({why}): it is taken for a large one",
        )
    if "vision_config" not in settings:
        raise UserError(f"base.model '{config.model}' has no vision: a vision-language model is needed")
    text = settings.get("text_config", settings)
    return Base(
        config.model,
        small=text.get("hidden_size", SMALL_WIDTH) < SMALL_WIDTH,
        tokenizer=_tokenizer(config.model, folder),
        pixels=_pixels(config.model, folder),
        exports=settings.get("model_type") == "qwen2_5_vl",
    )


def _file(model: str, folder: Path | None, name: str) -> Path:
    """A small file of the model; OSError where it is not to be had."""
    if folder is not None:
        if (folder / name).is_file():
            return folder / name
        raise FileNotFoundError(f"{folder} has no {name}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it warns at each of its tries
    try:
        return Path(hf_hub_download(model, name))
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(
            f"no folder '{model}', and no model of that name on the hub (or it asks for a login: `hf auth login`): "
            "--base takes a model's folder or a hub id"
        ) from None
    except HfHubHTTPError as error:  # no such file, or no access to it
        raise OSError(str(error)) from None


def _read(model: str, folder: Path | None, name: str) -> dict[str, Any]:
    values: dict[str, Any] = read_json(_file(model, folder, name))
    return values


def _tokenizer(model: str, folder: Path | None) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(_file(model, folder, "tokenizer.json")))
    except OSError:
        return None


def _pixels(model: str, folder: Path | None) -> tuple[int, int] | None:
    """The bounds of Qwen's processors; other families cut pictures into tiles."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            values = _read(model, folder, name)
        except OSError:
            continue
        values = values.get("image_processor", values)
        size = values.get("size", {})
        bounds = size.get("shortest_edge", values.get("min_pixels")), size.get("longest_edge", values.get("max_pixels"))
        if "merge_size" in values and None not in bounds:
            return bounds
    return None
