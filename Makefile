# `make demo` and `make test` are all a newcomer needs; each installs what it lacks into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo serve test lint bench reproduce proto clean

setup: .venv/.tested

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "jaxserve needs Python 3.12 or newer")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,aot]'
	@touch $@

demo: .venv/.installed
	$(BIN)/python scripts/demo.py

serve: .venv/.installed
	$(BIN)/python scripts/serve.py $(ARGS)

test: .venv/.tested
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed
	$(BIN)/python scripts/bench.py throughput
	$(BIN)/python scripts/bench.py stall

# The Sarathi-Serve paper's result table by simulation, into docs/results/paper.md; about ten minutes on one core.
reproduce: .venv/.installed
	$(BIN)/python scripts/reproduce.py

proto: .venv/.tested
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
		jaxserve/server/proto/jaxserve/v1/inference.proto

clean:
	rm -rf .venv
