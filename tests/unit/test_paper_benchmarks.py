"""The paper's benchmarks as data: its own averages follow from the figures, and the documentation has them all."""

from pathlib import Path

import pytest

from vismem.data.answer_forms import AnswerKind
from vismem.data.benchmarks import BENCHMARKS, Benchmark
from vismem.data.sample import Capability

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def mean(arm: str, *capabilities: Capability) -> float:
    scores = [getattr(benchmark, arm) for benchmark in BENCHMARKS if benchmark.capability in capabilities]
    return sum(scores) / len(scores)


def test_the_figures_have_the_averages_that_table_1_prints() -> None:
    assert len(BENCHMARKS) == 12
    assert (mean("vanilla", *Capability), mean("vismem", *Capability)) == pytest.approx((54.5, 65.5), abs=0.05)
    for capability, vanilla, vismem in zip(Capability, (59.3, 46.6, 57.7), (68.2, 60.2, 68.3), strict=True):
        assert mean("vismem", capability) == pytest.approx(vismem, abs=0.05)
        assert mean("vanilla", capability) == pytest.approx(vanilla, abs=0.25), "two of the paper's are 0.2 too high"


def cells(benchmark: Benchmark) -> list[str]:
    """The benchmark's row of the page's table."""
    kinds = "any" if set(benchmark.kinds) == set(AnswerKind) else ", ".join(benchmark.kinds)
    score = f"{benchmark.score}, by a judge" if benchmark.judge else benchmark.score
    asked = [", ".join((f"`{benchmark.file}.tsv`", *benchmark.parts)), kinds, score]
    if benchmark.unsupported:
        asked = [f"not supported: {benchmark.unsupported}", "", ""]
    return [benchmark.name, benchmark.capability.value, *asked, f"{benchmark.vanilla:.1f}", f"{benchmark.vismem:.1f}"]


def test_the_page_s_table_is_the_data() -> None:
    rows = [row for row in PAGE.read_text().splitlines() if row.startswith("| ")][1:]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [*map(cells, BENCHMARKS)]
