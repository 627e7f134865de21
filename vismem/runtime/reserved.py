"""A tokenizer's own tokens in user text: found and refused, or taken apart so that none is read as one."""

import re
from collections.abc import Iterable

from tokenizers import Tokenizer

from vismem.runtime.chat import Chat
from vismem.runtime.limits import RequestError

ZERO_WIDTH_SPACE = "\u200b"


class Reserved:
    """The special and added tokens of a tokenizer, and `more` that it will get, wherever they stand in a text.

    A text holds one as it is written, or once the tokenizer has normalised it. Blanks, and tokens of one character,
    which cannot be taken apart, are not reserved.
    """

    def __init__(self, tokenizer: Tokenizer, more: Iterable[str] = ()) -> None:
        normaliser = tokenizer.normalizer
        self.normalise = normaliser.normalize_str if normaliser else str
        written = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {*more}
        tokens = {form for token in written for form in (token, self.normalise(token)) if len(form.strip()) > 1}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def find(self, text: str) -> str | None:
        """The first token that `text` holds; None: it is plain."""
        found = self.pattern.search(text) or self.pattern.search(self.normalise(text))
        return found[0] if found else None

    def check(self, chat: Chat) -> None:
        """RequestError for a conversation that holds one."""
        for part in (part for turn in chat for part in turn.parts if part):
            if token := self.find(part):
                raise RequestError(f"holds {token}, one of the model's own tokens: ask without it", "PROMPT")

    def plain(self, text: str) -> str:
        """The text with a zero width space (U+200B) within each token, until there is none; plain text as it is."""
        text = self._taken_apart(text)
        return self._taken_apart(self.normalise(text)) if self.find(text) else text

    def _taken_apart(self, text: str) -> str:
        while self.pattern.search(text):
            text = self.pattern.sub(lambda token: token[0][0] + ZERO_WIDTH_SPACE + token[0][1:], text)
        return text
