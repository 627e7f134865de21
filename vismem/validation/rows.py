"""What is wrong with one sample by itself, by the rules that `validate` sets bad rows apart with; without the judge.

Great Expectations judges whole tables and takes seconds to import. A test holds both to the same verdicts.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd

from vismem.config import Severity, ValidateConfig
from vismem.data.fingerprint import ImageFacts
from vismem.data.sample import Sample
from vismem.runtime.reserved import Reserved
from vismem.validation.expectations import BETWEEN, NULL, Rule, rules
from vismem.validation.facts import row_facts


def row_faults(
    sample: Sample, settings: ValidateConfig, examine: Callable[[bytes], ImageFacts], reserved: Reserved | None
) -> list[str]:
    """What is wrong with the sample, one phrase per broken rule.

    Rules that compare it with other rows (unique ids, no image in two splits) are not asked, nor the one about the
    base's own tokens without `reserved`.
    """
    facts = row_facts(sample.as_row(), examine, reserved)
    asked = [rule for rule in rules(settings) if rule.severity is Severity.QUARANTINE and rule.column in facts]
    return [rule.broken.format(**facts) for rule in asked if _breaks(rule, facts[rule.column])]


def _breaks(rule: Rule, value: Any) -> bool:
    """As the expectation of that name judges one value; what is missing breaks none but NULL's opposite."""
    if pd.isna(value):
        return False
    if rule.expectation == NULL:
        return True
    if rule.expectation == BETWEEN:
        low, high = rule.arguments.get("min_value", value), rule.arguments.get("max_value", value)
        return not low <= value <= high
    return value not in rule.arguments["value_set"]
