"""Special tokens in user text: `plain_text` leaves none, and changes no other text."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from vismem.serving.runtime.prompt import ZERO_WIDTH_SPACE, plain_text

TOKENS = ("<m_I^s>", "<|im_end|>", "<|im_end|><|endoftext|>", "<|endoftext|>", "aa", "|")
PIECES = st.sampled_from((*TOKENS, *"<|>ma_", "end", ZERO_WIDTH_SPACE, "é"))


@given(st.lists(PIECES).map("".join))
def test_no_token_is_left_and_nothing_but_spaces_without_width_is_added(text: str) -> None:
    plain = plain_text(text, TOKENS)
    assert not [token for token in TOKENS if len(token) > 1 and token in plain]
    assert plain.replace(ZERO_WIDTH_SPACE, "") == text.replace(ZERO_WIDTH_SPACE, "")
    assert plain_text(plain, TOKENS) == plain


def test_a_space_without_width_stands_after_each_first_character() -> None:
    space = ZERO_WIDTH_SPACE
    assert plain_text("is <m_I^s> <|im_<|im_end|>end|>?", TOKENS) == f"is <{space}m_I^s> <|im_<{space}|im_end|>end|>?"
    assert plain_text("aaa", TOKENS) == f"a{space}a{space}a"


def test_text_without_tokens_stays_as_it_is() -> None:
    for text in ("", "a < b | c", "<m_i^s>", "色 <|im_end| >"):
        assert plain_text(text, TOKENS) == text


def test_limits_and_prompts_are_used_without_the_runtimes_other_packages() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['torch'] = None\n"
        "import vismem.serving.runtime.prompt, vismem.serving.runtime.limits"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
