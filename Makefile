# Two commands do everything, each with its own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
READY  := $(VENV)/.ready

.PHONY: demo test check bench clean

demo: $(READY)
	$(VENV)/bin/finetune demo

test: $(READY)
	$(VENV)/bin/python -m pytest

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python benchmarks/first_light.py

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

clean:
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache
