"""What a judge's reply says: one number from 0 to 1, or nothing."""

import pytest

from vismem.evaluation.judge import _score_in


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        *((reply, 0.5) for reply in ("0.5", " 0.5\n", "0.5.", "**0.5**", "Score: 0.5", "score=0.5", r"\boxed{0.5}")),
        *((reply, 1.0) for reply in ("1", "1.0", "1 (1.0)", "<think>0.2 or 0.3?</think>1.0")),
        *((reply, 0.0) for reply in ("0", "0.0", "The score is 0.")),
        *((reply, None) for reply in ("1/10", "1/2", "1 of 10", "1 out of 5", "-1", "\u22121", "1%", "100%", "1e-3")),
        *((reply, None) for reply in ("0,5", "0.5 or 1.0", "7", "1.5", "A1 is wrong", "1st", "2: no, 1", "", "None")),
        *((reply, None) for reply in ("<think>1.0", "0.5-0.6", "10", "0.5/1.0")),
    ],
)
def test_a_verdict_is_one_number_from_0_to_1(reply: str, score: float | None) -> None:
    assert _score_in(reply) == score
