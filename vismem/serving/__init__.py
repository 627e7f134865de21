"""Serving: the runtime that Triton loads, the server that runs it, the client that asks it."""
