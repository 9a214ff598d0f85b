"""Run-time forms of deltas: one contract (`reference`), faster forms per device."""
