#!/usr/bin/env bash
# Everything that needs a GPU: the tests marked `gpu` and those of the GPU kernels, which run natively
# there, then the benchmarks. Prints short tables and writes JSON and plots to $1 (default:
# benchmarks/results). STEPS names what to run, all of it by default; each takes minutes, so that a short
# loan of a machine can take them one by one:
#   tests linear experts kernels prefill step vllm
# vllm is not among those by default: it wants an environment with vLLM's CUDA build (torch 2.13), named
# by VLLM_PYTHON, and runs eager, with graphs, and with graphs in the second model runner.
# FETCH=--bitdelta also fetches BitDelta's public kernel and times it; a copy that lies in
# benchmarks/results/fetched/bitdelta_kernel.py is used as it is. gemlite's and vLLM's kernels are timed
# where these packages are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-.venv/bin/python}"
steps="${STEPS:-tests linear experts kernels prefill step}"
models="${MODELS:-llama-3.1-8b qwen2.5-7b}"
mkdir -p "$out"
plots=()
"$python" -c "import matplotlib" 2>/dev/null && plots=(--plots "$out")
for step in $steps; do
    echo "== $step"
    case "$step" in
    tests)
        "$python" -m pytest tests -q -m gpu
        "$python" -m pytest tests/runtime/test_triton*.py tests/runtime/test_siblings.py \
            tests/runtime/test_experts.py -q
        ;;
    linear) "$python" benchmarks/linear.py --device cuda --json "$out/linear-gpu.json" ;;
    experts) "$python" benchmarks/experts.py --device cuda --json "$out/experts-gpu.json" ;;
    kernels)
        for model in $models; do
            "$python" benchmarks/kernels.py --device cuda --models "$model" ${FETCH:-} \
                --json "$out/kernels-gpu-$model.json" "${plots[@]}"
        done
        ;;
    prefill)
        # 4096 tokens of one variant, of four and of eight.
        "$python" benchmarks/kernels.py --device cuda --models llama-3.1-8b --tokens 512 \
            --variants 8 --rounds 5 --json "$out/kernels-gpu-prefill-8.json"
        "$python" benchmarks/kernels.py --device cuda --models llama-3.1-8b --tokens 1024 \
            --variants 4 --rounds 5 --json "$out/kernels-gpu-prefill-4.json"
        ;;
    step) "$python" benchmarks/decode_step.py --device cuda --json "$out/step-gpu.json" ;;
    vllm)
        vllm="${VLLM_PYTHON:-.venv-vllm/bin/python}"
        size=(--hidden 4096 --layers 16 --tokens 128)
        "$vllm" benchmarks/vllm_serving.py "${size[@]}" --json "$out/vllm-gpu-eager.json"
        "$vllm" benchmarks/vllm_serving.py "${size[@]}" --compile --json "$out/vllm-gpu-graphs.json"
        VLLM_USE_V2_MODEL_RUNNER=1 "$vllm" benchmarks/vllm_serving.py "${size[@]}" --compile \
            --json "$out/vllm-gpu-graphs-v2.json"
        ;;
    *) echo "there is no step $step" >&2 && exit 2 ;;
    esac
done
