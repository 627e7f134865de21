"""Validation of prepared data: the rules, what they judge, the step and its report."""
