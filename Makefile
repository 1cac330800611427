# Every task of this project; `make help` lists them. What a run writes lies in build/; only `make refresh` writes over
# committed files.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help env figures test test-fast verify bench lab test-lab refresh notebooks \
	reconstruction train audit report clean FORCE
.DEFAULT_GOAL := help

# Values for the command line only: a variable of this name in the environment changes nothing.
PROFILE := default
COLOR :=
GRAY :=
MODEL := cnn6
INDEX := 0
DATA := embedded
SEED := 0
BATCH := 1
EPOCHS := 3
WEIGHTS :=
GRADIENTS :=
SHAPE :=
LOSS :=
SAMPLES :=
COUNT :=
CASES :=
ROUNDS :=
AGAINST :=
SCHEDULER :=
JOBS :=
PIP_ARGS :=
# By way of the environment values reach a recipe whole, whatever spaces a path has.
export COLOR GRAY MODEL INDEX DATA SEED BATCH EPOCHS WEIGHTS GRADIENTS SHAPE LOSS COUNT SCHEDULER ROUNDS AGAINST
# Images of containers often set it; every start of a kernel would then compile torch anew, for a quarter of a minute.
unexport PYTHONDONTWRITEBYTECODE
# The systems are small: more threads than free cores make them many times slower.
export OMP_NUM_THREADS ?= 1

# ---- The Python to run with: an active conda environment that has this package, else .venv.
CONDA_PYTHON := $(if $(CONDA_PREFIX),$(shell \
	"$(CONDA_PREFIX)/bin/python" -Ic 'import importlib.metadata as m; m.version("rgap"); m.version("papermill")' \
	2>/dev/null && echo '"$(CONDA_PREFIX)/bin/python"'))
PYTHON := $(or $(CONDA_PYTHON),.venv/bin/python)
ENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.installed)
# The first one new enough to make .venv with; looked for only when it is needed.
FIND_PYTHON = for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done

# ---- The profile: what a run writes, and where.
ifneq ($(COLOR)$(GRAY),)
ifeq ($(PROFILE),paper)
$(error PROFILE=paper has its own images; give either PROFILE=paper or COLOR= and GRAY=)
endif
override PROFILE := custom
endif
ifeq ($(filter default paper custom,$(PROFILE)),)
$(error PROFILE=$(PROFILE) is unknown; give PROFILE=paper, COLOR= and GRAY=, or nothing)
endif
FIGURES := build/$(PROFILE)/figures
PARAMETERS := $(if $(filter paper,$(PROFILE)),notebooks/paper.yml)$(if $(filter custom,$(PROFILE)),build/custom/.images)
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))
EXECUTED := $(NOTEBOOKS:notebooks/%=build/$(PROFILE)/%)
# Notebooks side by side, one a core unless JOBS= says how many; one failure stops none of the others.
jobs = $(if $(JOBS),--jobs $(JOBS))
run = RGAP_PROFILE=$(1) RGAP_FIGURES="$(CURDIR)/$(2)" $(if $(SCHEDULER),RGAP_SCHEDULER="$$SCHEDULER" )$(PYTHON)

# For a network of your own, whose images and loss the package does not know.
own = $${SHAPE:+--shape "$$SHAPE"} $${LOSS:+--loss "$$LOSS"}

# A text goes on in lines below its target that begin with two hashes.
help: ## list these targets
	@awk -F '(:.*)?## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2} /^## /{printf "%21s%s\n", "", $$2}' Makefile

env: $(ENV) ## .venv with every pinned package and this one; PIP_ARGS=… goes to the installer

figures: $(EXECUTED) | $(ENV) ## run the notebooks, compare with figures/, print the claims; JOBS=2
## PROFILE=paper | COLOR=folder:PATH GRAY=folder:PATH; SCHEDULER=tcp://… for Dask
	@$(if $(STALE),$(call run,$(PROFILE),$(FIGURES)) -m rgap notebooks run $(STALE) --into build/$(PROFILE) $(jobs) \
		$(if $(filter paper,$(PROFILE)),-f notebooks/paper.yml) $${COLOR:+-o color "$$COLOR"} $${GRAY:+-o gray "$$GRAY"})
	@$(call run,$(PROFILE),$(FIGURES)) -m rgap report --claims

# Only notes what has to run: `figures` runs it, because how long is left depends on all that runs.
build/$(PROFILE)/%.ipynb: notebooks/%.ipynb notebooks/claims.yml $(wildcard rgap/*.py rgap/*/*.py rgap/*/*/*.py) $(PARAMETERS) | $(ENV)
	@$(eval STALE += $<)

# Changes only when other images are asked for, and then the notebooks run again.
build/custom/.images: FORCE
	@mkdir -p $(@D)
	@printf '%s\n' "$$COLOR" "$$GRAY" | cmp -s - $@ || printf '%s\n' "$$COLOR" "$$GRAY" > $@

# Tests run side by side, a process a core.
test: $(ENV) ## unit tests with coverage, then the committed notebooks against what they print
	$(PYTHON) -m pytest --cov -n auto
	@$(call run,default,build/nbval/figures) -m rgap notebooks test $(NOTEBOOKS) --into build/nbval $(jobs)

test-fast: $(ENV) ## unit tests that take less than two seconds each, in about a minute
	$(PYTHON) -m pytest -m "not slow" -n auto

verify: $(ENV) ## attack random networks, write build/verify.csv; SAMPLES=chains COUNT=200 SEED=0
	@$(PYTHON) -m rgap verify $(SAMPLES) $${COUNT:+--count "$$COUNT"} --seed "$$SEED"

bench: $(ENV) ## CPU seconds and memory of attacks and audits, in build/bench.csv
## CASES='cnn6 fcn3-B5' ROUNDS=5 AGAINST=FILE.csv
	@$(PYTHON) -m rgap bench $(CASES) $${ROUNDS:+--rounds "$$ROUNDS"} $${AGAINST:+--against "$$AGAINST"}

lab: $(ENV) ## open JupyterLab in notebooks/, with the audit of your own model
	$(PYTHON) -m jupyterlab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/08_audit_your_model.ipynb

test-lab: $(ENV) ## JupyterLab in a real browser, used as by a person; a screenshot in build/lab/
	$(PYTHON) -m pytest tests/lab/test_lab.py

refresh: $(ENV) ## run the notebooks where they lie, over the committed outputs and figures/
	@$(call run,default,figures) -m rgap notebooks refresh $(NOTEBOOKS) --into build/refresh
	@$(call run,default,figures) -m rgap report --claims
	@$(PYTHON) -m rgap report --readme

notebooks: refresh

reconstruction: $(ENV) ## one attack; pictures in build/reconstruction/
## MODEL=cnn6|module:function DATA=embedded|cifar10|mnist|folder:PATH
## INDEX=0 BATCH=1 SEED=0 WEIGHTS=file GRADIENTS=file SHAPE=3,32,32 LOSS=mse
	@$(PYTHON) -m rgap reconstruct --model "$$MODEL" --index "$$INDEX" --data "$$DATA" --seed "$$SEED" --batch "$$BATCH" \
		--weights "$$WEIGHTS" $${GRADIENTS:+--gradients "$$GRADIENTS"} $(own)

train: $(ENV) ## a few epochs; a checkpoint for WEIGHTS= in build/weights/
## MODEL=cnn6|module:function DATA=embedded|cifar10|mnist|folder:PATH
## EPOCHS=3 SEED=0 SHAPE=3,32,32 LOSS=mse
	@$(PYTHON) -m rgap train --model "$$MODEL" --data "$$DATA" --epochs "$$EPOCHS" --seed "$$SEED" $(own)

audit: $(ENV) ## what a network gives away, in build/audit/; fails where it leaks
## MODEL=cnn6|module:function SHAPE=3,224,224 BATCH=1
	@$(PYTHON) -m rgap audit --model "$$MODEL" $${SHAPE:+--shape "$$SHAPE"} --batch "$$BATCH"

# Before any run the report shows what is committed.
report: SHOWN = $(if $(wildcard $(FIGURES))$(filter-out default,$(PROFILE)),$(FIGURES),figures)
report: $(ENV) ## notebooks, figures, tables, claims as web pages in build/report/; PROFILE=paper
	@$(call run,$(PROFILE),$(SHOWN)) -m rgap report

clean: ## remove everything made in build/, downloaded data apart
	rm -rf .coverage .pytest_cache .ruff_cache .hypothesis
	if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name data -exec rm -rf {} +; fi

# uv takes a third of pip's time; pip is there for where uv is not, or does not find the index that pip is set up for.
# Both verify the hashes of requirements.txt, which are those of the Python Package Index. Of wheels built elsewhere, as
# torch's for CPUs alone, they differ: UV_NO_VERIFY_HASHES=1 make env PIP_ARGS='--extra-index-url URL' takes those, too.
.venv/.installed: requirements.txt pyproject.toml
	@mkdir -p build
	@[ -n "$$($(FIND_PYTHON))" ] || { echo "make env: no Python 3.11 or later on the PATH$$(python3 --version 2>/dev/null \
		| sed 's/^/ (python3 is /; s/$$/)/'); install one, or use conda with environment.yml" >&2; exit 1; }
	@[ -x .venv/bin/python ] || "$$($(FIND_PYTHON))" -m venv --clear .venv > build/env.log 2>&1 || { rm -rf .venv; \
		echo "make env: $$($(FIND_PYTHON)) cannot make a virtual environment; install its venv module" \
		"(Debian and Ubuntu: apt install python3-venv). Details: build/env.log" >&2; exit 1; }
	@echo "installing packages into .venv, some minutes without a cache; progress: build/env.log"
	@{ .venv/bin/python -m pip install $(PIP_ARGS) "$$(grep -o '^uv==[^ ;]*' requirements.txt)" && \
		.venv/bin/uv pip install --python .venv/bin/python $(PIP_ARGS) -r requirements.txt -e . || \
		{ .venv/bin/python -m pip install $(PIP_ARGS) -r requirements.txt && \
		.venv/bin/python -m pip install $(PIP_ARGS) --no-deps -e .; }; } > build/env.log 2>&1 || { \
		echo "make env: the packages could not be installed; connect to a network, or name a package index by" \
		"make env PIP_ARGS='--index-url URL'. Details: build/env.log" >&2; exit 1; }
	@touch $@
