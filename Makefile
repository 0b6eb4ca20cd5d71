# All steps of the project. Each is a file that depends on the files of earlier steps: finished steps are not repeated,
# interrupted ones resume. `make` without a target lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

# --- Variables for users: make TARGET NAME=value ---------------------------------------------------------------

PYTHON ?= python3
VENV ?= .venv
# Settings for `vico train`; under `make test`, further arguments for pytest.
ARGS ?=
# Your own recipe for train-stage1, train-router and train-routed; without one they run the embedded default.
RECIPE ?=
# Folder of the demo. ARGS become part of its name, so that another seed gets a run of its own:
# make demo ARGS="seed=1" uses runs/demo-seed=1.
quoted = '$(subst ','\'',$(1))'
slug = $(shell printf %s $(call quoted,$(strip $(1))) | tr / _ | tr -cs 'A-Za-z0-9._=-' '-')
ifeq ($(origin RUN),undefined)
RUN := runs/demo$(if $(strip $(ARGS)),-$(call slug,$(ARGS)))
endif
# GlyphDocs shards of the demo: numbers of samples and seeds. All demo runs share them.
SHARDS ?= data/shards/glyphs
TRAIN_SAMPLES ?= 5000
CALIBRATION_SAMPLES ?= 1000
VALIDATION_SAMPLES ?= 400
TRAIN_SEED ?= 1
CALIBRATION_SEED ?= 2
VALIDATION_SEED ?= 3
# Tables of make study; none: all.
TABLE ?=
PORT ?= 6006
DOCS_PORT ?= 8001

# --- Names -----------------------------------------------------------------------------------------------------

BIN := $(VENV)/bin
VICO := $(BIN)/vico
INSTALLED := $(VENV)/.installed

# Each file marks a finished step: the command of the step writes it last.
DEMO_SHARDS := $(foreach part,train calibration val,$(SHARDS)/$(part)/index.json)
CONSISTENCY := $(RUN)/consistency/model/config.json
ROUTER := $(RUN)/router/model/config.json
CALIBRATION := $(RUN)/router/model/calibration.json
ROUTED := $(RUN)/routed/model/config.json
REPORT := $(RUN)/report/report.json
BASE := data/base/model.safetensors

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Targets that are not files, even if a file or folder of that name exists.
.PHONY: help env demo base train-stage1 train-router train-routed shards data tests test check
.PHONY: coverage format lint types docs docs-serve tensorboard bench clean clean-all

help: ## List the targets
	@echo 'usage: make TARGET [ARGS="key=value ..."] [RECIPE=FILE.yaml] [RUN=FOLDER]'
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- Environment -----------------------------------------------------------------------------------------------

env: $(INSTALLED) ## Create .venv with the tested versions (constraints.txt)
	@echo "$(VENV) is ready"

# A killed pip leaves incomplete packages that look installed. They lack INSTALLER, the last file but one that pip
# writes: remove the metadata of such packages, so that pip installs them again.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or run make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: vico_pl needs Python 3.11 or newer; run make PYTHON=python3.11" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@for info in $(VENV)/lib/python*/site-packages/*.dist-info; do [ -e "$$info/INSTALLER" ] || rm -rf "$$info"; done
	@echo "Installing into $(VENV): about 6 GB with PyTorch's CUDA packages, 2 to 3 minutes the first time ..."
	@[ -t 1 ] || quiet=-q; $(BIN)/python -m pip install $${quiet:-} --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

# --- The demo: shards -> stage 1 -> stage 2 -> calibration -> report -------------------------------------------

demo: $(DEMO_SHARDS) $(REPORT) ## Train, calibrate and evaluate the embedded default: about 8 minutes on 2 cores
	@echo
	@echo "$(RUN) is done:"
	@echo "  report           $(RUN)/report/report.html"
	@echo "  figures          $(REPORT)"
	@echo "  training curves  make tensorboard"
	@echo "  routed model     $(RUN)/router/model"
	@echo "Try the model on an image of GlyphDocs; it knows no other images:"
	@echo "  tar -xf $(SHARDS)/val/val-000000.tar -C $(RUN) 00000006.jpg"
	@echo "  $(VICO) route $(RUN)/router/model $(RUN)/00000006.jpg --output $(RUN)/routed.png"
	@echo "  $(VICO) generate $(RUN)/router/model $(RUN)/00000006.jpg --prompt 'How many shapes are there?'"
	@echo "To train again from the start: make clean, or set another RUN=FOLDER."

data: shards
shards: $(DEMO_SHARDS) ## Draw the demo's GlyphDocs shards into data/shards/glyphs

# Prerequisites after | must exist; their age does not count, so a checkout that touches a file retrains nothing.
$(SHARDS)/train/index.json: | $(INSTALLED)
	$(VICO) shards glyphs --output $(@D) --num-samples $(TRAIN_SAMPLES) --seed $(TRAIN_SEED)

$(SHARDS)/calibration/index.json: | $(INSTALLED)
	$(VICO) shards glyphs --output $(@D) --num-samples $(CALIBRATION_SAMPLES) --seed $(CALIBRATION_SEED)

$(SHARDS)/val/index.json: | $(INSTALLED)
	$(VICO) shards glyphs --output $(@D) --num-samples $(VALIDATION_SAMPLES) --seed $(VALIDATION_SEED)

# $(call train,RECIPE,RUN FOLDER,SETTINGS): resumes an earlier call. RUN FOLDER.begun_with has the checksum of the model
# that the run started from: if that has been trained again, the run is refused, never removed. A run stopped by a
# signal saves and exits with 0, hence the check in the last line.
define train
@[ -z "$<" ] || { \
  model=$$(cd $(<D) && { cat config.json model*.safetensors 2>/dev/null || true; } | cksum); \
  [ -e $(2)/config.yaml ] || { mkdir -p $(dir $(2)) && echo "$$model" >$(2).begun_with; }; \
  [ ! -e $(2).begun_with ] || [ "$$(cat $(2).begun_with)" = "$$model" ] || { \
    echo "$(2) was begun with another model than $(<D) holds now; remove $(2) to train it again, or set another RUN=FOLDER" >&2; exit 2; }; }
$(VICO) train $(1) run_dir=$(2) $(3) $(ARGS)
@[ -e $@ ] || { echo "$(2) is not finished; the same command resumes it" >&2; exit 1; }
endef

# Both recipes validate on the set for calibration, not on that of the report.
$(CONSISTENCY): | $(INSTALLED) $(SHARDS)/train/index.json $(SHARDS)/calibration/index.json $(BASE)
	$(call train,recipes/demo/consistency.yaml,$(RUN)/consistency)

$(ROUTER): $(CONSISTENCY) | $(INSTALLED) $(SHARDS)/train/index.json $(SHARDS)/calibration/index.json
	$(call train,recipes/demo/router.yaml,$(RUN)/router,model.path=$(RUN)/consistency/model)

$(CALIBRATION): $(ROUTER) | $(SHARDS)/calibration/index.json
	$(VICO) calibrate $(RUN)/router/model --data $(SHARDS)/calibration

$(REPORT): $(CALIBRATION) | $(SHARDS)/val/index.json
	$(VICO) eval $(RUN)/router/model --data $(SHARDS)/val --output $(RUN)/report

# Not part of the demo. Its model is to be calibrated again.
$(ROUTED): $(CALIBRATION) | $(INSTALLED) $(SHARDS)/train/index.json $(SHARDS)/calibration/index.json
	$(call train,recipes/demo/routed.yaml,$(RUN)/routed,model.path=$(RUN)/router/model)

ifeq ($(strip $(RECIPE)),)
train-stage1: $(CONSISTENCY)
train-router: $(ROUTER)
train-routed: $(ROUTED)
train-stage1 train-router train-routed:
	@echo "The trained model is in $(<D); training curves: make tensorboard"
else
train-stage1 train-router train-routed: $(INSTALLED)
	$(VICO) train $(RECIPE) $(if $(filter file,$(origin RUN)),,run_dir=$(RUN)) $(ARGS)
endif
train-stage1: ## Train stage 1, consistency: the demo's, or RECIPE=FILE.yaml ARGS="key=value ..."
train-router: ## Train stage 2, the resolution router: the demo's, or RECIPE=FILE.yaml ARGS="key=value ..."
train-routed: ## Train stage 3, consistency at routed ratios: the demo's, or RECIPE=FILE.yaml ARGS="key=value ..."

# --- On a cluster ----------------------------------------------------------------------------------------------

NODES ?= 1
# GPUs per node; 0 trains on CPUs.
GPUS ?= 8
# Options for sbatch: partition, account, time.
OPTIONS ?=
DRY ?=
on_gpus = $(if $(filter-out 0,$(GPUS)),--ntasks-per-node=$(GPUS) --gpus-per-node=$(GPUS),--ntasks-per-node=1)

.PHONY: slurm reliability
slurm: ## Submit RECIPE=FILE.yaml to Slurm: NODES=2 GPUS=8 OPTIONS="--partition=P" ARGS="key=value"; DRY=1 only prints
	@[ -n "$(RECIPE)" ] || { echo "RECIPE is not set; expected make slurm RECIPE=FILE.yaml NODES=2 GPUS=8" >&2; exit 2; }
	$(if $(DRY),@echo )sbatch --nodes=$(NODES) $(on_gpus) $(OPTIONS) recipes/slurm/train.sbatch $(RECIPE) \
	  $(if $(filter file,$(origin RUN)),,run_dir=$(RUN)) $(ARGS)

reliability: $(INSTALLED) ## Inject every fault into real runs, also under Slurm, and update the table of docs/reliability.md
	$(BIN)/python benchmarks/reliability.py

# --- The base model: included in data/base, rebuilt only on request --------------------------------------------

BASE_RUN := runs/base
BASE_SHARDS := data/shards/base
BASE_MODEL := $(BASE_RUN)/model/config.json

base: $(BASE_MODEL) ## Rebuild the base model of the repository: half an hour on 2 cores; resumes if interrupted
	mkdir -p data/base
	cp $(BASE_RUN)/model/* $(BASE_RUN)/config.yaml $(BASE_RUN)/metrics.jsonl data/base/
	(cd $(BASE_RUN)/model && sha256sum *) >data/base/SHA256SUMS

# The repository contains this file, so this runs only if it is missing.
$(BASE):
	@echo "$@ is missing and will be trained; git checkout data/base restores it at once"
	$(MAKE) base ARGS=

# Each part of the curriculum in recipes/demo/pretrain.yaml: images, seed, most tiles per image, fraction of reading pages.
BASE_PARTS := read one few all
BASE_read := --num-samples 12000 --seed 101 --max-tiles 1 --read-fraction 1
BASE_one := --num-samples 16000 --seed 102 --max-tiles 1 --read-fraction 0.3
BASE_few := --num-samples 16000 --seed 103 --max-tiles 3 --read-fraction 0.05
BASE_all := --num-samples 32000 --seed 104 --max-tiles 6
BASE_SHARD_SETS := $(foreach part,$(BASE_PARTS),$(BASE_SHARDS)/$(part)/index.json)

$(BASE_SHARD_SETS): $(BASE_SHARDS)/%/index.json: | $(INSTALLED)
	$(VICO) shards glyphs --output $(@D) --questions 8 --comparisons 3 $(BASE_$*)

$(BASE_MODEL): | $(INSTALLED) $(BASE_SHARD_SETS)
	$(call train,recipes/demo/pretrain.yaml,$(BASE_RUN))

# The base model of the free layout, that of the study. Parts of its curriculum: aligned text, aligned questions, the same
# off the cells, then free pages of 1, up to 3 and up to 6 tiles (recipes/free/read.yaml); shapes, and all together
# (recipes/free/shapes.yaml).
FREE_RUN := runs/base-free
FREE_SHARDS := data/shards/base-free
FREE_BASE := data/base-free/model.safetensors
FREE_READ := $(FREE_RUN)/read/model/config.json
FREE_MODEL := $(FREE_RUN)/shapes/model/config.json
FREE_read := --num-samples 12000 --seed 100 --max-tiles 1 --read-fraction 1
FREE_one := --num-samples 24000 --seed 101 --max-tiles 1 --read-fraction 0.3
FREE_moved := --num-samples 20000 --seed 102 --max-tiles 1 --read-fraction 0.5 --jitter 15
FREE_single := --num-samples 64000 --seed 103 --max-tiles 1 --read-fraction 0.3 --layout free
FREE_few := --num-samples 48000 --seed 104 --max-tiles 3 --read-fraction 0.05 --layout free
FREE_all := --num-samples 64000 --seed 105 --max-tiles 6 --layout free
FREE_shapes := --num-samples 24000 --seed 106 --max-tiles 3 --layout free --shapes-fraction 1
FREE_mixed := --num-samples 48000 --seed 107 --max-tiles 6 --layout free --shapes-fraction 0.3
free_sets = $(foreach part,$(1),$(FREE_SHARDS)/$(part)/index.json)

.PHONY: base-free
base-free: $(FREE_MODEL) ## Rebuild the base model of the study: 70 minutes on 2 cores; resumes if interrupted
	mkdir -p data/base-free
	cp $(FREE_RUN)/shapes/model/* data/base-free/
	for part in read shapes; do for file in config.yaml metrics.jsonl; do \
	  cp $(FREE_RUN)/$$part/$$file data/base-free/$$part.$$file; done; done
	(cd $(FREE_RUN)/shapes/model && sha256sum *) >data/base-free/SHA256SUMS

$(FREE_BASE):
	@echo "$@ is missing and will be trained; git checkout data/base-free restores it at once"
	$(MAKE) base-free ARGS=

$(call free_sets,read one moved single few all shapes mixed): $(FREE_SHARDS)/%/index.json: | $(INSTALLED)
	$(VICO) shards glyphs --output $(@D) --questions 8 --comparisons 3 $(FREE_$*)

$(FREE_READ): | $(INSTALLED) $(call free_sets,read one moved single few all)
	$(call train,recipes/free/read.yaml,$(FREE_RUN)/read)

$(FREE_MODEL): $(FREE_READ) | $(call free_sets,shapes mixed)
	$(call train,recipes/free/shapes.yaml,$(FREE_RUN)/shapes)

# --- Training curves -------------------------------------------------------------------------------------------

tensorboard: $(INSTALLED) ## Show the training curves of all runs in a browser; PORT=6006
	@mkdir -p runs
	@echo "Open http://localhost:$(PORT)/ ; stop with Ctrl-C."
	$(BIN)/tensorboard --logdir runs --port $(PORT)

# --- Checks ----------------------------------------------------------------------------------------------------

FORMAT_CHECK := $(BIN)/ruff format --check .
LINT := $(BIN)/ruff check .
TYPES := $(BIN)/mypy
# ruff, found by PATH, wraps long signatures; the variable silences an advertisement of the theme for its successor.
DOCS := env PATH="$(BIN):$(PATH)" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
PARALLEL := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

tests: test
test: $(INSTALLED) ## Run the tests; ARGS="-k router", ARGS="-m slow"
	$(BIN)/pytest $(ARGS)

check: $(INSTALLED) ## Format check, lint, types, docs, and the tests in parallel: all that CI runs
	@verdict=passed; summary=; \
	phase() { \
	  local name=$$1 start=$$SECONDS result=passed; shift; \
	  printf '\n==> %s: %s\n' "$$name" "$$*"; \
	  "$$@" || { result=FAILED; verdict=FAILED; }; \
	  summary+=$$(printf '  %-8s %s in %d s' "$$name" "$$result" $$((SECONDS - start)))$$'\n'; \
	}; \
	phase format $(FORMAT_CHECK); \
	phase lint $(LINT); \
	phase types $(TYPES); \
	phase docs $(DOCS) build --strict --quiet; \
	phase tests $(PARALLEL); \
	printf '\n%s\ncheck %s\n' "$$summary" "$$verdict"; [ $$verdict = passed ]

coverage: $(INSTALLED) ## Measure which lines the tests run, at least 85 %: takes 1.7 times as long as the tests
	$(PARALLEL) --cov=vico_pl

format: $(INSTALLED) ## Format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED) ## Find style errors and likely bugs (ruff)
	$(LINT)

types: $(INSTALLED) ## Check types (mypy strict)
	$(TYPES)

# --- Documentation: pages in docs/, navigation in mkdocs.yml -----------------------------------------------------

docs: $(INSTALLED) ## Build the documentation into site/, with every link checked
	$(DOCS) build --strict --quiet
	@echo "site/index.html is written"

docs-serve: $(INSTALLED) ## Show the documentation in a browser, rebuilt at every change; DOCS_PORT=8001
	$(DOCS) serve --dev-addr localhost:$(DOCS_PORT)

# --- Benchmarks ------------------------------------------------------------------------------------------------

bench: $(INSTALLED) ## Measure speed and memory against their goals: about 16 minutes, 10 GiB of memory
	for name in kl labels step scaling monitoring checkpoints inference data start; do $(BIN)/python benchmarks/$$name.py; done

.PHONY: gpu-check structure study
study: $(INSTALLED) $(FREE_BASE) ## Compare the choices of the method, 20 minutes a model: TABLE="headline loss", ARGS="--seeds 3 4"
	@$(BIN)/python benchmarks/study.py $(TABLE) $(ARGS)

gpu-check: $(INSTALLED) ## Measure all that needs a GPU, on one GPU: under 8 minutes
	@$(BIN)/python benchmarks/gpu.py

structure: $(INSTALLED) ## Print how large the code is, as CONTRIBUTING.md shows it
	@$(BIN)/python benchmarks/structure.py

# --- Cleaning: fixed names only, so that no variable can make it delete your data ------------------------------

clean: ## Remove runs and shards of the demo, and caches; keeps other runs and data/base
	rm -rf runs/demo runs/demo-* data/shards/glyphs
	rm -rf site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find vico_pl tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

clean-all: clean ## Also remove .venv and the shards of the base models and the study
	rm -rf .venv data/shards/base data/shards/base-free data/shards/study *.egg-info
