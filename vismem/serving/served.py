"""What a runtime asks of the executor that it serves."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from PIL import Image
from tokenizers import Tokenizer

from vismem.generation.invocation import InvocationPolicy
from vismem.generation.loop import Executor
from vismem.runtime.chat import Chat


class Served(Executor, Protocol):
    """An executor that takes questions from outside."""

    new_tokens: int  # the longest answer where a request does not say

    @property
    def modes(self) -> Mapping[str, InvocationPolicy]:
        """What a request may ask for, by name."""

    @property
    def tokenizer(self) -> Tokenizer:
        """One that several threads may decode with."""

    def running(self) -> AbstractContextManager[object]:
        """What the thread that decodes runs in."""

    def prepare(self, images: Sequence[Image.Image], chat: Chat, max_new_tokens: int) -> Any:
        """A sample for a request, with its images decoded; RequestError for an unusable one. Any thread may call it."""

    def read(self, sample: Any, memory: bool) -> None:
        """What can be computed of a sample before it joins, by any thread; `memory`: memories may be formed on it."""
