"""The four special tokens that invoke and end a memory, and the delimiter set (paper Sec. 3.2, Eq. 3)."""

from typing import Any

from vismem.models.kinds import MemoryKind

KINDS = tuple(MemoryKind)  # the order of the invoke rows, and of the end rows
MEMORY_TOKENS = ("<m_I^s>", "<m_I^l>", "<m_E^s>", "<m_E^l>")  # both invokes, both ends


def marked_text(text: str, event: str) -> str:
    """A piece of an answer as it is shown: ⟨short⟩ or ⟨long⟩ where that is its event, else the text."""
    return f"⟨{event}⟩" if event in KINDS else text


def add_memory_tokens(tokenizer: Any) -> tuple[int, int, int, int]:
    """Register `MEMORY_TOKENS` as indivisible special tokens; return their ids in that order. Safe to repeat."""
    tokenizer.add_tokens(list(MEMORY_TOKENS), special_tokens=True)
    short, long, short_end, long_end = tokenizer.convert_tokens_to_ids(list(MEMORY_TOKENS))
    return short, long, short_end, long_end


def delimiter_ids(tokenizer: Any, delimiters: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of all ordinary tokens whose text ends with one of `delimiters`."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in ids])
    return tuple(i for i, text in zip(ids, texts, strict=True) if text.rstrip(" ").endswith(delimiters))
