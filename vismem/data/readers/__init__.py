"""Readers of visual questions: one file a format, each with `read(source, split, seed)`."""
