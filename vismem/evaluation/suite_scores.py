"""What a suite's evaluation found, benchmark by benchmark, beside the paper's figures."""

from vismem.records import Part, Record


class SuiteBenchmark(Part):
    """One benchmark of a suite: scores in percent by arm, ours and the paper's (Table 1)."""

    capability: str
    n: int
    left_out: dict[str, int]  # rows of its file by the reason why they were not asked
    score: str  # what is counted
    scores: dict[str, float]
    paper: dict[str, float]
    why: str  # it has no scores; empty where it has


class Suite(Record, file="suite.json", step="suite"):
    """`suite.json` of `vismem evaluate --suite`; `macro`: arm -> mean over the benchmarks that have scores."""

    benchmarks: dict[str, SuiteBenchmark]
    macro: dict[str, float]

    def paper_macro(self, arm: str) -> float | None:
        """The paper's mean over the same benchmarks; None for an arm that its Table 1 does not have."""
        own = [each.paper[arm] for each in self.benchmarks.values() if each.scores and arm in each.paper]
        return sum(own) / len(own) if own else None

    def lines(self) -> list[str]:
        """A line per benchmark and one for the mean, the paper's figures in brackets."""
        found = [f"{name}: {each.why or _beside(each.scores, each.paper)}" for name, each in self.benchmarks.items()]
        paper = {arm: mean for arm in self.macro if (mean := self.paper_macro(arm)) is not None}
        return [*found, f"mean of those scored: {_beside(self.macro, paper)}"]


def _beside(scores: dict[str, float], paper: dict[str, float]) -> str:
    brackets = {arm: f" (paper {score:.1f})" for arm, score in paper.items()}
    return ", ".join(f"{arm} {score:.1f}{brackets.get(arm, '')}" for arm, score in scores.items())
