"""Samples, their sources, and the step that prepares them."""
