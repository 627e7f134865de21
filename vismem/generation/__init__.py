"""Decoding with memory: rollouts, invocation policies, and scoring answers again with gradient."""
