#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests marked `gpu` and those of the GPU kernels, which run
# natively there, then the benchmarks. Prints short tables and writes JSON and plots to $1 (default:
# benchmarks/results). FETCH=--bitdelta also fetches BitDelta's public kernel and times it.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-.venv/bin/python}"
mkdir -p "$out"
plots=()
"$python" -c "import matplotlib" 2>/dev/null && plots=(--plots "$out")
"$python" -m pytest tests -q -m gpu
"$python" -m pytest tests/runtime/test_triton*.py -q
"$python" benchmarks/linear.py --device cuda --json "$out/linear-gpu.json"
"$python" benchmarks/kernels.py --device cuda ${FETCH:-} --json "$out/kernels-gpu.json" "${plots[@]}"
"$python" benchmarks/kernels.py --device cuda --tokens 256 --variants 1 4 \
    --json "$out/kernels-gpu-prefill.json"
