"""What README and docs quote of the study is what its page says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results" / "embedded.md").read_text()


def score(arm: str) -> str:
    (found,) = re.findall(rf"^\| {re.escape(arm)} \| (\d+\.\d) ±", PAGE, flags=re.MULTILINE)
    return str(found)


@pytest.mark.parametrize(
    ("work", "arm"),
    [
        ("Latent Domain Prompt Learning", "static prefix"),
        ("Towards General Continuous Memory", "continuous"),
        ("Phantom of Latent", "SFT-LoRA, matched"),
    ],
)
def test_each_neighbour_s_nearest_arm_has_its_figure(work: str, arm: str) -> None:
    text = " ".join((ROOT / "docs" / "neighbours.md").read_text().split())
    (own,) = re.findall(rf"\*\*{re.escape(work)}\*\*.*?Its figure[^:]*: (\d+\.\d) %", text)
    assert own == score(arm)


def test_the_readme_quotes_the_study() -> None:
    (said,) = re.findall(r"^- With memory (.*?)\. The aim", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    gain, low, high = re.findall(r"^\| VisMem \|.*\| \+(\S+) \(\+(\S+) to \+(\S+)\) \|$", PAGE, flags=re.MULTILINE)[0]
    assert said == (
        f"{score('VisMem')} % right, without {score('vanilla')} %: +{gain} points (95 % interval {low} to {high}; "
        "above 0 in every seed)"
    )
    assert "above 0 in 3 of 3" in re.findall(r"^\| M7 \|.*", PAGE, flags=re.MULTILINE)[0]
