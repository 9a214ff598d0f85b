"""Deltas applied in their packed form on a GPU, one launch a layer for all variants of a batch.

Nothing here is imported on machines without a GPU; `docs/kernels.md` describes layout and kernels.
"""
