"""What the step `validate` finds in the shards; its report and its files are made from it."""

from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from vismem.config import Severity
from vismem.data.fingerprint import SPLITS, data_sha256
from vismem.validation.expectations import Verdict
from vismem.validation.facts import Shard


@dataclass(frozen=True)
class Findings:
    """All that is known after judging; the report is made from it."""

    shards: list[Shard]
    rows: pd.DataFrame  # one row of facts per sample, see `collect_facts`
    splits: pd.DataFrame  # one row per split, of its good rows
    reasons: dict[int, str]  # why a row (index of `rows`) is bad
    verdicts: list[Verdict]
    task_mix: dict[str, dict[str, float]]  # split -> task -> share of its good rows
    profile: dict[str, float]  # task -> share, which drift is measured against

    @cached_property
    def clean(self) -> pd.DataFrame:
        """The facts of the good rows."""
        return self.rows.drop(index=list(self.reasons))

    @cached_property
    def data_sha256(self) -> str:
        """Hex hash of the good rows, see `vismem.data.fingerprint`."""
        return data_sha256({split: self.clean.loc[self.clean["split"] == split, "sha256"] for split in SPLITS})

    @property
    def errors(self) -> list[str]:
        """The broken rules that stop the pipeline, each with its message."""
        return [f"{v.rule.name}: {v.message}" for v in self._broken(Severity.ERROR)]

    @property
    def warnings(self) -> list[str]:
        """The names of the broken rules that are only reported."""
        return [v.rule.name for v in self._broken(Severity.WARNING)]

    def _broken(self, severity: Severity) -> list[Verdict]:
        return [v for v in self.verdicts if not v.success and v.rule.severity is severity]
