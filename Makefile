# make train   train the tiny model to its end on a CPU (about five minutes) and write its report
# make cluster two processes with four virtual devices each, as a rehearsal of a cluster
# make test    lint, layering and the test suite
# make test-kernels   the kernels' tests alone (PYTHON=python3.12 VENV=.venv312 takes jax 0.11)
# make bench   ours, peer and ratio of every benchmark
# make sass    compile the GPU kernels without a GPU, and fail on register spills
# make overlap compile the training step for 8 H100s without one: do all-to-alls hide?
# make notebooks   execute the notebooks and write their outputs
# make gpu     everything that wants a Hopper GPU, unattended, in under 25 minutes
#
# Each needs Python 3.11 or newer and nothing else: the environment is made in .venv on first use.
# PYTHON=python3.12 chooses the interpreter, WORKDIR=... the run's folder, ARGS=... extra arguments.
# GPU_PYTHON=python3 lets `make gpu` use an environment as it is; ARGS=--dry rehearses on a CPU.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/tiny
ARGS ?=
TEST_PROCESSES ?= 2

GPU_PYTHON ?=
# What `make cluster` trains: sequences over two replicas, experts over 2 x 2 devices, ZeRO-1.
CLUSTER := --config=experiments/tiny.py:smoke --config.runtime.mesh.data=2 \
  --config.runtime.mesh.node=2 --config.runtime.mesh.gpu=2 --config.runtime.zero=1

BIN := $(VENV)/bin
MADE := $(VENV)/.created
BASE := $(VENV)/.installed
FULL := $(VENV)/.installed-test
BARE := $(VENV)/.installed-pytest
GPU := $(VENV)/.installed-gpu
# In a folder apart: a CUDA plugin without its libraries makes every start of jax complain.
SASS := $(VENV)/sass

.DEFAULT_GOAL := help
.PHONY: help train cluster test test-kernels bench lint sass overlap notebooks gpu clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Stamps: each is written last, so that an interrupted installation is repeated.
$(MADE):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(BASE): $(MADE) setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(FULL): $(MADE) setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(BASE) $@

$(BARE): $(MADE) setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[pytest]'
	@touch $(BASE) $@

$(GPU): $(MADE) setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[gpu]'
	@touch $(BASE) $@

# The check says itself what it misses, so what cannot be had here is no error.
$(SASS)/.installed: $(BASE)
	@$(BIN)/python -c 'import configparser; c = configparser.ConfigParser(); c.read("setup.cfg"); \
	  print(c["options.extras_require"]["sass"])' >$(VENV)/sass.txt
	@if $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(SASS) \
	  --requirement $(VENV)/sass.txt; then touch $@; fi

train: $(BASE)
	$(BIN)/dsv3 train --config=experiments/tiny.py --workdir=$(WORKDIR) $(ARGS)

cluster: WORKDIR = runs/cluster
cluster: $(BASE)
	$(BIN)/python -m dsv3_jax.rehearsal --processes=2 --devices=4 \
	  train $(CLUSTER) --workdir=$(WORKDIR) $(ARGS)

lint: $(FULL)
	$(BIN)/ruff check .
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

test-kernels: $(BARE)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) tests/kernels $(ARGS)

bench: $(FULL)
	$(BIN)/python -m benchmarks $(ARGS)

sass: $(SASS)/.installed
	$(BIN)/python -m pallas_kernels.sass_check $(ARGS)

overlap: $(SASS)/.installed
	$(BIN)/python -m benchmarks.overlap $(ARGS)

notebooks: $(FULL)
	$(BIN)/python -m notebooks $(ARGS)

gpu: $(if $(GPU_PYTHON),,$(if $(findstring --dry,$(ARGS)),$(BASE),$(GPU)))
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf .venv .venv312 $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
