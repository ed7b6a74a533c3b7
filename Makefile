# `make help` lists the commands. Each creates or refreshes the environment
# that it needs; what is done already is not done again.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

WORKDIR ?= runs/demo
CONFIG ?= configs/demo.py
PYTHON := .venv/bin/python
# An environment with which no other folder on PYTHONPATH interferes.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# $(call environment,FOLDER,REQUIREMENTS): pip is upgraded first, because old
# ones take minutes to resolve. A folder without its stamp is a half-made one.
define environment
python=$$(launch/find_python.sh); \
echo "creating $(1) with $$python"; \
rm -rf $(1); \
"$$python" -m venv $(1); \
$(1)/bin/python -m pip install --quiet --upgrade pip; \
$(1)/bin/python -m pip install --quiet $(addprefix -r ,$(2)); \
$(1)/bin/python -m pip check
endef

# An environment that no longer runs, say because its Python is gone, is made
# anew: its stamp goes before make looks at it.
healthy = import pip, importlib.util as u; \
  assert all(map(u.find_spec, ("jax", "flax", "grain", "optax", "pytest")))
$(foreach folder,.venv .venv-parity .venv-hf,$(if $(wildcard $(folder)/.done),\
  $(shell $(folder)/bin/python -c '$(healthy)' >&2 || rm $(folder)/.done)))

.PHONY: help environments setup data demo gemma test test-long test-docs test-meshes \
  test-parity test-hf test-gemma mutations fuzz audit figures bench sizing \
  drill soak overoptimisation notebooks notebooks-quick notebooks-keep lm-eval \
  lint venv libtpu browser

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile | column -t -s:

.venv/.done: requirements.txt requirements-dev.txt
	@$(call environment,.venv,$^)
	@touch $@

.venv/.notebooks: .venv/.done requirements-notebooks.txt
	@$(PYTHON) -m pip install --quiet -r requirements-notebooks.txt
	@touch $@

.venv-parity/.done: requirements.txt requirements-dev.txt requirements-gemma.txt
	@$(call environment,.venv-parity,$^)
	@touch $@

.venv-hf/.done: requirements.txt requirements-dev.txt requirements-hf.txt
	@$(call environment,.venv-hf,$^)
	@touch $@

.venv-fuzz/.done: requirements.txt requirements-dev.txt requirements-fuzz.txt
	@$(call environment,.venv-fuzz,$^)
	@touch $@

.venv-audit/.done: requirements-audit.txt
	@$(call environment,.venv-audit,$^)
	@touch $@

venv: .venv/.done

# Not into .venv, where jax would ask it for a TPU in every command.
ifeq ($(shell uname -sm),Linux x86_64)
libtpu: .libtpu/.done
else
libtpu:
endif

.libtpu/.done: .venv/.done requirements-plan.txt
	@rm -rf .libtpu
	@$(PYTHON) -m pip install --quiet --no-deps --target .libtpu \
	  -r requirements-plan.txt
	@touch $@

# For the tests that open the report. Without it they are skipped, and say so.
browser: .browser/.done

.browser/.done: tests/install_browser.sh
	@tests/install_browser.sh .browser || echo 'make: NO BROWSER, so the report' \
	  'will not be opened in one: its tests are skipped' >&2

# Not a stamp: the command itself sees what is there, and redoes what is broken.
data: venv
	@$(PYTHON) -m bond_jax.movie_reviews --data_dir=data

# All environments that .ci/run needs; with -j, side by side.
environments: .venv/.notebooks .venv-parity/.done .venv-hf/.done libtpu browser

setup: data libtpu  ## create .venv, fetch the demo's data and the TPU compiler

demo: setup  ## sft, reward model, J-BOND and evaluation, into runs/demo
	@for stage in sft reward_model train evaluate; do \
	  $(PYTHON) -m bond_jax.$$stage --config=$(CONFIG) --workdir=$(WORKDIR); \
	done

gemma: setup  ## Gemma 3 270M, before and after, into runs/gemma; ACCEPT_GEMMA_TERMS=yes
	@$(PYTHON) -m bond_jax.gemma_270m --data_dir=data \
	  $(if $(filter yes,$(ACCEPT_GEMMA_TERMS)),--accept_gemma_terms)
	@for stage in reward_model train evaluate; do \
	  $(PYTHON) -m bond_jax.$$stage --config=configs/gemma3_270m_laptop.py \
	    --workdir=runs/gemma; \
	done

test: venv libtpu  ## the core test suite; needs no network and no data
	@$(PYTHON) -m pytest -n 2 --dist loadfile

test-docs: venv libtpu  ## run every command of README.md and docs/ (minutes)
	@$(PYTHON) -m pytest -n 2 --dist loadgroup -m slow tests/test_commands.py

test-long: venv libtpu browser  ## what the core suite leaves out (minutes)
	@$(PYTHON) -m pytest -n 2 --dist loadfile -m long

test-meshes: venv  ## every mesh, with all numbers of micro-batches (minutes)
	@$(PYTHON) -m pytest -n 2 -m slow tests/training/test_meshes.py

HF_TESTS := $(addprefix tests/parity/test_,transformers.py rewards_hf.py \
  datasets.py lm_eval.py)
GEMMA_TEST := tests/parity/test_gemma_270m.py

test-parity: .venv-parity/.done  ## against the gemma library; own environment
	@.venv-parity/bin/python -m pytest -n 2 --dist loadfile tests/parity \
	  $(HF_TESTS:%=--ignore=%) --ignore=$(GEMMA_TEST)

test-hf: .venv-hf/.done  ## with transformers, peft, datasets and lm_eval; likewise
	@.venv-hf/bin/python -m pytest -n 2 --dist loadfile $(HF_TESTS)

test-gemma: .venv-hf/.done  ## released weights, 240 MB; ACCEPT_GEMMA_TERMS=yes
	@.venv-hf/bin/python -m pytest -rs $(GEMMA_TEST)

# GSM8K, HellaSwag and MMLU are fetched from the hub; see docs/lm_eval.md.
RUN ?= $(WORKDIR)
TASKS ?= gsm8k,hellaswag,mmlu
lm-eval: .venv-hf/.done  ## benchmarks before and after: RUN=runs/mine TASKS=gsm8k
	@.venv-hf/bin/python -m benchmarks.harness --workdir=$(RUN) \
	  --tasks=$(TASKS) $(ARGS)

mutations: venv browser  ## break the code in every line of tests/mutations.txt
	@$(PYTHON) tests/mutate.py

# 25,000 inputs, in about 15 minutes; SEED=1 gives others.
SEED ?= 0
fuzz: .venv-fuzz/.done  ## 25,000 strange files, answers and flags; own environment
	@.venv-fuzz/bin/python tests/fuzz.py --seed=$(SEED)

# Every version is pinned, so nothing is resolved; what cannot be looked up is an
# error.
audit: .venv-audit/.done  ## known vulnerabilities of all that is pinned, by PyPI
	@status=0; for file in requirements*.txt; do echo "== $$file"; \
	  .venv-audit/bin/pip-audit --strict --no-deps --disable-pip \
	    --progress-spinner=off -r $$file || status=1; \
	done; exit $$status

# WIND's first figure is of exact tables; the others train.
FIGURES := bond_2 bond_b1 bond_4 bond_5 bond_6 bond_7 bond_8 wind_2
figures: venv  ## the papers' figures at laptop scale, into runs/figures
	@$(PYTHON) -m benchmarks.papers.wind_1 --out=runs/figures/wind_1
	@for figure in $(FIGURES); do \
	  $(PYTHON) -m benchmarks.papers.reproduce --config=configs/figures.py:$$figure \
	    --workdir=runs/figures/$$figure; \
	done

overoptimisation: setup  ## learnt reward against gold as the KL grows, a figure
	@PYTHONPATH=. $(PYTHON) benchmarks/overoptimisation.py \
	  --out=runs/overoptimisation

sizing: venv libtpu  ## docs/sizing.md: which config fits which slice (hours)
	@$(PYTHON) -m benchmarks.sizing --out=runs/sizing

bench: venv  ## speed beside other samplers and trainers, into runs/bench
	@$(PYTHON) -m benchmarks.bench --out=runs/bench

drill: venv  ## kill runs and damage checkpoints, 500 times (an hour)
	@$(PYTHON) -m benchmarks.drill --out=runs/drill

soak: venv  ## 20,000 steps, watched for leaks, into runs/soak
	@$(PYTHON) -m benchmarks.soak --out=runs/soak

# $(call execute,FOLDER): all notebooks of a folder, two at a time.
define execute
mkdir -p $(1)/colab/executed && cd $(1)/colab && printf '%s\n' *.ipynb | \
PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=$(1) \
xargs -P 2 -I{} $(CURDIR)/$(PYTHON) -m jupyter execute \
  --kernel_name=python3 --output=executed/{} {}
endef

notebooks: .venv/.notebooks data  ## execute colab/*.ipynb into colab/executed
	@$(call execute,$(CURDIR))

# Of their runs, which are thrown away, only the numbers are smaller.
QUICK := $(CURDIR)/build/notebooks
notebooks-quick: .venv/.notebooks data  ## the same with small numbers, for CI
	@rm -rf $(QUICK) && mkdir -p $(QUICK) && cp -r colab configs $(QUICK)
	@ln -s $(CURDIR)/{bond_jax,benchmarks,data} $(QUICK)
	@# Their starts, too: not every config has an sft stage to take a flag.
	@sed -i -E 's/(sft\.(steps=|update\(steps=))[0-9]+/\116/' \
	  $(QUICK)/colab/*.ipynb $(QUICK)/configs/demo.py
	@export JAX_DISABLE_MOST_OPTIMIZATIONS=true \
	  JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.pytest_cache/jax \
	  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	  NOTEBOOK_FLAGS="--config.train.steps=3 \
	  --config.train.optimizer.warmup_steps=1 --config.train.probe_prompts=16 \
	  --config.evaluate.prompts=16 --config.evaluate.policy_completions=2 \
	  --config.evaluate.reference_completions=16"; $(call execute,$(QUICK))

notebooks-keep: .venv/.notebooks  ## the outputs of the last `make notebooks`
	@$(PYTHON) colab/keep_outputs.py

lint: venv  ## ruff, as .pre-commit-config.yaml has it
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
