"""Serving deltas inside vLLM: an out-of-tree plugin. Nothing here is imported without vLLM."""
