"""The tokens that VisMem adds, and those behind which a memory may be invoked."""

import tiny

from recipes.tiny_vlm.model import build_processor
from vismem.models.tokens import MEMORY_TOKENS, add_memory_tokens, delimiter_ids


def test_memory_tokens_are_indivisible_special_and_added_once() -> None:
    tokenizer = build_processor([sample.question for sample in tiny.samples()]).tokenizer
    size = len(tokenizer)
    ids = add_memory_tokens(tokenizer)
    assert ids == add_memory_tokens(tokenizer) == tuple(range(size, size + 4))
    assert tokenizer("".join(MEMORY_TOKENS), add_special_tokens=False)["input_ids"] == list(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


class Texts:
    """A tokenizer whose tokens are these texts."""

    all_special_ids = (0, 3)
    texts = ("<s>.", "a", "a.", "<e>,", ".", "a. ", ".a", "?!\n", ",  ", "a.\t", "a.X")

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.texts[i] for i in row) for row in rows]


def test_delimiters_are_the_ordinary_tokens_that_end_with_one_but_for_spaces() -> None:
    assert delimiter_ids(Texts(), (".", ",")) == (2, 4, 5, 8)
    assert delimiter_ids(Texts(), ("\n",)) == (7,)
    assert delimiter_ids(Texts(), ("!",)) == ()
