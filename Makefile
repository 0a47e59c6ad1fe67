# Everything installs itself into .venv first; every target below is safe to call on a fresh machine.
PYTHON ?= python3.11
PY := .venv/bin/python
ARGS ?=

.PHONY: install train test test-slow test-gpu check format bench docs clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -x $(PY) || $$(command -v $(PYTHON) || command -v python3) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

train: install  ## the main job on its embedded default; pass overrides as ARGS="..."
	$(PY) -m jobs.train $(ARGS)

test: install  ## the default tier, the tests with a Ray beside the others; one process: ARGS="-n 0"
	$(PY) -m pytest -n 2 --dist loadgroup $(ARGS)

test-slow: install  ## the long tier: kill schedules, real data, every configuration to the end
	$(PY) -m pytest -m slow --timeout=3000 $(ARGS)

test-gpu: install
	$(PY) -m pytest -m gpu $(ARGS)

check: install  ## format, lint, types, layering
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest tests/test_layering.py

format: install
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: install  ## every benchmark in its short form; NAME=memory runs one
	$(PY) -m benchmarks $(NAME) $(ARGS)

docs: install  ## the site, with the API from docstrings, in build/site; fails on a warning
	$(PY) -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(PY) -m mkdocs build --strict

clean:
	rm -rf .venv build dist *.egg-info
