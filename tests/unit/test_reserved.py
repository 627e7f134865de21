"""A tokenizer's own tokens in user text: all are found, none is left in plain text, and other text is not touched."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers

from vismem.runtime.chat import Turn, one_turn
from vismem.runtime.limits import RequestError
from vismem.runtime.reserved import ZERO_WIDTH_SPACE, Reserved

SPECIAL = ("<m_I^s>", "<|im_end|>", "<|im_end|><|endoftext|>", "<|endoftext|>", "|")
ADDED = ("aa", "<K;>", "\u00e9\u00e9", "  ")
PIECES = st.sampled_from((*SPECIAL, *ADDED, *"<|>ma_\u212a;\u037eK\u00e9", "end", "e\u0301", ZERO_WIDTH_SPACE))


def tokenizer_of(tokens: tuple[str, ...] = (), normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.normalizer = normalizer or normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in (*ADDED, *tokens)])
    return tokenizer


TOKENIZER = tokenizer_of()
RESERVED = Reserved(TOKENIZER)
OWN = {token.content for token in TOKENIZER.get_added_tokens_decoder().values()} - {"|", "  "}


def read(text: str) -> set[str]:
    """The tokens of its own that the tokenizer makes of a text."""
    return OWN & {TOKENIZER.id_to_token(token) for token in TOKENIZER.encode(text).ids}


@given(st.lists(PIECES).map("".join))
def test_of_plain_text_the_tokenizer_makes_no_token_of_its_own(text: str) -> None:
    plain = RESERVED.plain(text)
    assert read(plain) == set()
    assert RESERVED.find(plain) is None
    assert RESERVED.plain(plain) == plain


@given(st.lists(PIECES).map("".join))
def test_whatever_the_tokenizer_reads_as_its_own_is_found(text: str) -> None:
    assert RESERVED.find(text) is not None or not read(text)


@given(st.lists(PIECES).map("".join))
def test_nothing_but_spaces_without_width_is_put_in(text: str) -> None:
    same = TOKENIZER.normalizer.normalize_str
    bare = text.replace(ZERO_WIDTH_SPACE, "")
    plain = RESERVED.plain(bare)
    assert same(plain.replace(ZERO_WIDTH_SPACE, "")) == same(bare)
    if RESERVED.find(text) is None:
        assert RESERVED.plain(text) == text


def test_a_space_without_width_stands_after_each_first_character() -> None:
    space = ZERO_WIDTH_SPACE
    plain = f"is <{space}m_I^s> <|im_<{space}|im_end|>end|>?"
    assert RESERVED.plain("is <m_I^s> <|im_<|im_end|>end|>?") == plain
    assert RESERVED.plain("aaa") == f"a{space}a{space}a"


def test_a_token_spelled_in_characters_that_normalise_to_it_is_found_and_taken_apart() -> None:
    spelled = "<\u212a\u037e>"  # the signs of Kelvin and of a Greek question
    assert "<K;>" not in spelled
    assert read(spelled) == {"<K;>"}
    assert RESERVED.find(f"is {spelled}?") == "<K;>"
    assert RESERVED.plain(spelled) == f"<{ZERO_WIDTH_SPACE}K;>"


def test_a_token_is_known_in_the_form_that_the_tokenizer_normalises_it_to() -> None:
    reserved = Reserved(tokenizer_of(("<IMG>",), normalizers.Lowercase()), ["<NEW>"])
    for text in ("<IMG>", "<img>", "<Img>", "<new>"):
        assert reserved.find(text) == text.lower() or reserved.find(text) == text


def test_text_without_tokens_and_blanks_stay_as_they_are() -> None:
    for text in ("", "a < b | c", "<m_i^s>", "色 <|im_end| >", "two  spaces", "e\u0301 and \u212a"):
        assert RESERVED.find(text) is None
        assert RESERVED.plain(text) == text


def test_a_prompt_that_holds_one_is_refused_with_its_name() -> None:
    RESERVED.check(one_turn("a plain question", 1))
    with pytest.raises(RequestError, match=r"^PROMPT holds <m_I\^s>, one of the model's own tokens: ask without it$"):
        RESERVED.check([Turn("user", ("what?",)), Turn("assistant", ("<m_I^s>",)), Turn("user", ("why?",))])


def test_limits_and_prompts_are_used_without_the_runtimes_other_packages() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['torch'] = None\n"
        "import vismem.runtime.prompt, vismem.runtime.limits"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
