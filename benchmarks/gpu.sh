#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests marked `gpu`, then the benchmarks.
# Prints a short table and writes JSON to $1 (default: benchmarks/results).
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-.venv/bin/python}"
mkdir -p "$out"
"$python" -m pytest tests -q -m gpu
"$python" benchmarks/linear.py --device cuda --json "$out/linear-gpu.json"
