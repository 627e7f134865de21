"""The two kinds of latent memory (paper Sec. 3.3)."""

from enum import StrEnum


class MemoryKind(StrEnum):
    """Short-term (visual) or long-term (semantic) memory."""

    SHORT = "short"
    LONG = "long"

    @property
    def other(self) -> "MemoryKind":
        """The swapped kind, as in tau_rev of Eq. 14."""
        return MemoryKind.LONG if self is MemoryKind.SHORT else MemoryKind.SHORT
