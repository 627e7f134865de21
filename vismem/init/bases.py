"""What a base model takes, from its small files only: its family, its tokenizer, the pictures and words that it reads.

No weights are read, and nothing of transformers is imported.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from vismem.config import BaseConfig
from vismem.config.training import SMALL_WIDTH
from vismem.data.sample import Sample
from vismem.errors import UserError, first_line
from vismem.export import WITH_GRAPHS
from vismem.init.rows import Row
from vismem.models.families import check_family
from vismem.models.small_files import read_small, read_tokenizer
from vismem.models.tokens import MEMORY_TOKENS
from vismem.runtime.chat import said
from vismem.runtime.images import size_after_resizing
from vismem.runtime.limits import RequestError
from vismem.runtime.reserved import Reserved
from vismem.scope import Scope

CHARS_PER_TOKEN = 3  # of a tokenizer that could not be loaded; few languages need more tokens


@dataclass(frozen=True)
class Base:
    """What is known of the model that goes in. `unknown` says why the rest is not; empty where it is."""

    model: str  # as `base.model` has it
    small: bool  # whether a CPU can train it
    tokenizer: Any = None  # tokenizers.Tokenizer
    processor: Any = None  # its settings for images, where it is of Qwen's kind
    scope: Scope | None = None  # what it was trained to read, where it says so
    graphs: bool = True  # whether its family can be exported as ONNX graphs
    unknown: str = ""

    def longest(self, texts: Iterable[str]) -> int:
        """How many tokens the longest text has; without a tokenizer a guess that is rather too high."""
        if self.tokenizer is None:
            return max(len(text) // CHARS_PER_TOKEN + 1 for text in texts)
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return max(len(one.ids) for one in encoded)

    def reserved(self) -> Reserved | None:
        """Its own tokens, those that VisMem adds among them; None where its tokenizer is not known."""
        return None if self.tokenizer is None else Reserved(self.tokenizer, MEMORY_TOKENS)

    def doubts(self, sample: Sample) -> list[str]:
        """Why the base's answer to this question would mean nothing, one line each; none where nothing is known."""
        if self.processor is None:
            return []
        try:
            images = [Image.open(io.BytesIO(data)) for data in sample.images]
            seen = [size_after_resizing(image.size, self.processor) for image in images]
            return list(self.scope.doubts(images, seen, said(sample.turns()))) if self.scope else []
        except RequestError as error:
            return [str(error)]
        except OSError as error:  # an image that does not decode, where the rules let it pass
            return [str(error).split("<")[0].strip()]

    def resized(self, rows: Sequence[Row]) -> Iterator[str]:
        """How the base sees pictures that are too large or too small for it, one sentence each."""
        sizes = Counter(size for row in rows for size in row.sides)
        if self.processor is None or not sizes:
            return
        low, high = self.processor.size["shortest_edge"], self.processor.size["longest_edge"]
        for what, seen, outside in (
            ("large", "shrunk", {size: n for size, n in sizes.items() if math.prod(size) > high}),
            ("small", "enlarged", {size: n for size, n in sizes.items() if math.prod(size) < low}),
        ):
            if outside:
                size = (max if what == "large" else min)(outside, key=math.prod)
                shown = "{} x {}".format(*size_after_resizing(size, self.processor))
                yield (
                    f"{sum(outside.values())} of {sizes.total()} images are too {what} for the base, which sees "
                    f"{low:,} to {high:,} pixels: they are {seen}, one of {size[0]} x {size[1]} to {shown}"
                )


def look_at(config: BaseConfig) -> Base:
    """What is known of `base.model`, a folder or a hub id.

    UserError for what is no vision-language model, and for another family than we support. A hub that cannot be reached
    is no error: the model is then taken for a large one.
    """
    folder = config.folder()
    if folder is None and Path(config.model).is_absolute():
        raise UserError(f"no folder {config.model}: --base takes a model's folder or a hub id")
    try:
        settings = read_small(config, "config.json")
    except OSError as error:
        why = f"{config.model} cannot be looked at ({first_line(error)}): it is taken for a large one"
        return Base(config.model, small=False, unknown=why)
    if "vision_config" not in settings:
        raise UserError(f"base.model '{config.model}' has no vision: a vision-language model is needed")
    check_family(str(settings.get("model_type")))
    text = settings.get("text_config", settings)
    return Base(
        config.model,
        small=text.get("hidden_size", SMALL_WIDTH) < SMALL_WIDTH,
        tokenizer=_tokenizer(config),
        processor=_processor(config),
        scope=Scope.read(folder) if folder else None,
        graphs=settings.get("model_type") in WITH_GRAPHS,
    )


def _tokenizer(config: BaseConfig) -> Any:
    try:
        return read_tokenizer(config)
    except OSError:
        return None


def _processor(config: BaseConfig) -> Any:
    """The settings of a processor of Qwen's kind; other families cut pictures into tiles."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            values = read_small(config, name)
        except OSError:
            continue
        values = values.get("image_processor", values)
        size = values.get("size") or {}
        low, high = (
            size.get(key, values.get(old))
            for key, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
        )
        if "merge_size" in values and low and high:
            bounds = {"shortest_edge": low, "longest_edge": high}
            return SimpleNamespace(**{"do_resize": True, **values, "size": bounds})
    return None
