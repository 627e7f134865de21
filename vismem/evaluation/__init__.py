"""Comparing decoding policies on the same questions: answers, statistics, arms, the report."""
