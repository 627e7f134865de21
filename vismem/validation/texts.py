"""What is wrong with a row's texts by themselves: damaged encodings, mark-up, marks of images, choices, no answer."""

import re
from collections.abc import Iterable, Sequence

from vismem.data.answer_forms import normalise
from vismem.data.sample import lettered
from vismem.runtime.chat import MARK

Named = Iterable[tuple[str, str | None]]  # the name of a field, and its text

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")  # and turned text
_OTHER_THAN_ASCII = re.compile(r"[^\x00-\x7f]+")
_LEADS = "\u00c2\u00c3\u00c4\u00c5\u00ce\u00cf\u00d0\u00d1"  # of Latin, Greek, Cyrillic in UTF-8, so read
_MARKUP = re.compile(
    r"<\|[\w ]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>"
    r"|</?(?:bos|eos|pad|unk|img|video|audio|think|start_of_turn|end_of_turn)>"
    r"|&(?:amp|lt|gt|quot|nbsp|#x?[0-9a-f]{1,6});|</?(?:br|p|div|span|b|i|li|ul|a)\b[^<>]{0,200}>",
    re.IGNORECASE,
)
MISSING = {"n/a", "#n/a", "nan", "null", "undefined", "todo", "tbd", "?", "<na>"}  # written as an answer


def encoding_fault(texts: Named) -> str | None:
    """The first text that a wrong encoding damaged, and how; None where none is."""
    for name, text in texts:
        if "\ufffd" in (text or ""):
            return f"'{name}' holds U+FFFD, where characters were lost: read the file with its own encoding"
        if found := _CONTROL.search(text or ""):
            return f"'{name}' holds the control character U+{ord(found[0]):04X}"
        for run in _OTHER_THAN_ASCII.findall(text or ""):
            if len(run) == 2 and run[0] not in _LEADS:  # the end of a sound word, and a quote or a dash
                continue
            data = run.encode("cp1252", "ignore")  # what it was read from, if it was UTF-8 read as Windows-1252
            if len(data) == len(run) and (meant := data.decode(errors="ignore")).encode() == data:
                return f"'{name}' holds '{run[:20]}', which is '{meant[:20]}' in UTF-8 read as another encoding"
    return None


def markup_fault(texts: Named) -> str | None:
    """The first piece of another model's template or of HTML, and where it stands."""
    found = ((name, _MARKUP.search(text or "")) for name, text in texts)
    return next((f"{piece[0]} in '{name}'" for name, piece in found if piece), None)


def mark_fault(question: str, images: int) -> str | None:
    """That a question has other marks `<image>` than images: all of them would be read as text."""
    marks = question.count(MARK)
    return f"{marks} marks {MARK} for {images} images" if marks not in (0, images) else None


def choice_fault(choices: Sequence[str]) -> str | None:
    """The first choice that is there twice, or that there is only one; empty ones are not offered."""
    offered = [normalise(choice) for choice in lettered(choices).values()]
    twice = next((f"choice '{choice}' is there twice" for choice in offered if offered.count(choice) > 1), None)
    return "only one choice" if len(offered) == 1 else twice
