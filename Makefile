# Two commands do everything, each with its own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
READY  := $(VENV)/.ready
PEERS  := trl unsloth llamafactory litgpt

.PHONY: demo test check bench liger docs clean

demo: $(READY)
	$(VENV)/bin/finetune demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not alone"
	$(VENV)/bin/python -m pytest -m alone

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python scripts/docs_reference.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: $(READY) $(PEERS:%=.bench/venv-%/.ready)
	$(VENV)/bin/python benchmarks/speed.py

# Liger's kernels on a CPU, in Triton's interpreter; Triton alone is 0.7 GB, so they have an environment of their own
liger: .bench/venv-liger/.ready
	TRITON_INTERPRET=1 PYTHONPATH=src .bench/venv-liger/bin/python -m pytest tests/test_liger_kernels.py

.bench/venv-liger/.ready: requirements.txt
	$(PYTHON) -m venv .bench/venv-liger
	.bench/venv-liger/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt triton==3.7.1 liger-kernel==0.8.5
	touch $@

# torch first, so that nothing else decides which build comes
.bench/venv-%/.ready: benchmarks/environments/%.txt
	$(PYTHON) -m venv .bench/venv-$*
	.bench/venv-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.bench/venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

.bench/venv-trl/.ready:
	$(PYTHON) -m venv .bench/venv-trl
	.bench/venv-trl/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 peft==0.21.2
	touch $@

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

clean:
	rm -rf $(VENV) build dist site outputs .pytest_cache .mypy_cache .ruff_cache
