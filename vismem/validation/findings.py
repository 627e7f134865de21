"""What the step `validate` finds in the shards; its report and its files are made from it."""

from dataclasses import dataclass

import pandas as pd

from vismem.validation.expectations import Severity, Verdict
from vismem.validation.facts import Shard


@dataclass(frozen=True)
class Findings:
    """All that is known after judging; the report is made from it."""

    shards: list[Shard]
    rows: pd.DataFrame  # one row of facts per sample, see `collect_facts`
    splits: pd.DataFrame  # one row per split, of its good rows
    reasons: dict[int, str]  # why a row (index of `rows`) is bad
    verdicts: list[Verdict]
    messages: dict[str, str]  # of each rule
    task_mix: dict[str, dict[str, float]]  # split -> task -> share of its good rows
    profile: dict[str, float]  # task -> share, which drift is measured against

    @property
    def errors(self) -> list[str]:
        """The broken rules that stop the pipeline."""
        broken = [v.rule.name for v in self.verdicts if not v.success and v.rule.severity is Severity.ERROR]
        return [f"{name}: {self.messages[name]}" for name in broken]
