#!/usr/bin/env bash
# Everything that needs a GPU: the tests marked `gpu` and those of the GPU kernels, which run natively
# there, then the benchmarks. Prints short tables and writes JSON and plots to $1 (default:
# benchmarks/results). STEPS names what to run, all of it by default; each takes minutes, so that a short
# loan of a machine can take them one by one:
#   tests linear experts kernels prefill step vllm
# vllm is not among those by default: it wants an environment with vLLM's CUDA build (torch 2.13), named
# by VLLM_PYTHON, and runs eager, with graphs, and with graphs in the second model runner.
# A step that fails does not keep the others from running; the exit code then is 1, and the last line
# names those that failed. What a benchmark measured before it was cut short is in its JSON file.
#
# Needs Python with torch for CUDA, triton, numpy, safetensors, tqdm, click, pyyaml, transformers,
# pydantic and zstandard, for the tests also pytest and hypothesis, for plots matplotlib; nothing is
# installed into it. PYTHON names it (default: .venv's, else python3). On a machine without a network,
# bring the wheels of what it lacks, with what they need (as pydantic_core, annotated_types and
# typing_inspection), in a folder: $WHEELS, or .wheels, which git ignores.
# FETCH=--bitdelta also fetches BitDelta's public kernel and times it; a copy that lies in
# benchmarks/results/fetched/bitdelta_kernel.py is used as it is. gemlite's and vLLM's kernels are timed
# where these packages are installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
steps="${STEPS:-tests linear experts kernels prefill step}"
models="${MODELS:-llama-3.1-8b qwen2.5-7b}"
wheels="${WHEELS:-.wheels}"
mkdir -p "$out" || exit 2

# The working tree's own code, whatever is installed.
sh .ci/links
export PYTHONPATH="$PWD/.dev${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$wheels/*.whl" >/dev/null; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$PYTHONPATH:$site"
fi
for package in torch triton numpy safetensors tqdm click yaml transformers pydantic zstandard; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$package') is None)" ||
        missing="${missing:-} $package"
done
if [ -n "${missing:-}" ]; then
    echo "$python has no$missing: bring their wheels in $wheels" >&2
    exit 2
fi
plots=()
"$python" -c "import matplotlib" 2>/dev/null && plots=(--plots "$out")
failed=""

# What to run, its name being the step's.
try() {
    "$python" "$@" || { echo "== $step: failed: $*" && failed="$failed $step"; }
}

for step in $steps; do
    echo "== $step"
    case "$step" in
    tests)
        # Other versions of packages than ours may warn of other things.
        try -m pytest tests/runtime -q -m gpu --continue-on-collection-errors -W default
        try -m pytest tests/runtime/test_triton*.py tests/runtime/test_siblings.py \
            tests/runtime/test_experts.py tests/runtime/test_prefill.py \
            tests/runtime/test_vllm_packed.py -q -m "not gpu" -W default
        ;;
    linear) try benchmarks/linear.py --device cuda --json "$out/linear-gpu.json" ;;
    experts) try benchmarks/experts.py --device cuda --json "$out/experts-gpu.json" ;;
    kernels)
        for model in $models; do
            try benchmarks/kernels.py --device cuda --models "$model" ${FETCH:-} \
                --json "$out/kernels-gpu-$model.json" "${plots[@]}"
        done
        ;;
    prefill)
        # 4096 tokens of one variant, of four and of eight.
        try benchmarks/kernels.py --device cuda --models llama-3.1-8b --tokens 512 \
            --variants 8 --rounds 5 --json "$out/kernels-gpu-prefill-8.json"
        try benchmarks/kernels.py --device cuda --models llama-3.1-8b --tokens 1024 \
            --variants 4 --rounds 5 --json "$out/kernels-gpu-prefill-4.json"
        ;;
    step) try benchmarks/decode_step.py --device cuda --json "$out/step-gpu.json" ;;
    vllm)
        size=(--hidden 4096 --layers 16 --tokens 128)
        (
            python="${VLLM_PYTHON:-.venv-vllm/bin/python}" failed=""
            try benchmarks/vllm_serving.py "${size[@]}" --json "$out/vllm-gpu-eager.json"
            try benchmarks/vllm_serving.py "${size[@]}" --compile --json "$out/vllm-gpu-graphs.json"
            export VLLM_USE_V2_MODEL_RUNNER=1
            try benchmarks/vllm_serving.py "${size[@]}" --compile \
                --json "$out/vllm-gpu-graphs-v2.json"
            [ -z "$failed" ]
        ) || failed="$failed $step"
        ;;
    *)
        echo "there is no step $step" >&2
        failed="$failed $step"
        ;;
    esac
done
[ -z "$failed" ] || { echo "== failed:$failed" && exit 1; }
