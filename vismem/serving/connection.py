"""A connection that answers share, for clients that are used from one event loop or several."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Connection(Generic[T]):
    """What `connect` opens, kept for the event loop that asks, to which it belongs. It closes with its last user."""

    def __init__(self, connect: Callable[[], T]) -> None:
        self.connect = connect
        self.kept: tuple[asyncio.AbstractEventLoop, T] | None = None

    def get(self) -> T:
        """The one of the running loop."""
        loop = asyncio.get_running_loop()
        if self.kept is None or self.kept[0] is not loop:
            self.kept = loop, self.connect()
        return self.kept[1]

    def drop(self) -> None:
        """Open another next time: one that broke waits longer and longer before it tries again."""
        self.kept = None
