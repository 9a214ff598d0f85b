# Each target makes what it needs on a fresh machine and does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test dev lint bench wheel clean help

help:
	@echo "make demo   set up, then serve 30 compressed fine-tunes from one base and compare them"
	@echo "make test   set up, then run the whole test suite"
	@echo "make dev    set up an editable environment and the links that type checkers read"
	@echo "make lint   ruff and mypy --strict"
	@echo "make bench  the CPU benchmark of the delta kernels"
	@echo "make wheel  build the wheel, install it into an empty environment, run the demo there"

demo: $(STAMP)
	$(BIN)/deltafold demo

test: dev
	$(BIN)/python -m pytest tests

dev: $(STAMP) .dev/deltafold

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p deltafold

bench: $(STAMP)
	$(BIN)/python benchmarks/linear.py

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

# Editable installs go through an import hook that static tools cannot follow: give them links.
.dev/deltafold:
	mkdir -p $@
	ln -sfn ../../compress $@/compress
	ln -sfn ../../runtime $@/runtime
	ln -sfn ../../server $@/server
	ln -sfn ../../runtime/_api/__init__.py $@/__init__.py
	ln -sfn ../../runtime/_api/py.typed $@/py.typed

clean:
	rm -rf $(VENV) .dev build dist .venv-wheel *.egg-info .pytest_cache .mypy_cache .ruff_cache
