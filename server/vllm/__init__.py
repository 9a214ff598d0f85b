"""vLLM's own server with deltas: names from a zoo, loads beside the running streams."""
