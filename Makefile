# the newest one that runs; `make PYTHON=/path/to/python3.12 install` takes another
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11,$(if $(shell $(name) -c "import venv; print(1)" 2>/dev/null),$(name))))
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install data demo test test-soak test-fast gpu bench lint format clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(READY)  ## Create .venv with every package at its pinned version

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=..."; exit 2; }
	@echo "Installing into $(VENV): 2.8 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --no-compile --progress-bar on --disable-pip-version-check -c constraints.txt -e '.[pipeline,faces,lite,dlib,onnx,dev]'
	@# in as many processes as there are cores, where pip would take one; what is for another Python does not compile
	@echo "Compiling it"
	@$(VENV)/bin/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib > /dev/null || true
	@touch $@

data: $(READY)  ## Check the files of the data sets that params.yaml names, then prepare them
	python -m pipelines.stages.inputs
	dvc repro

demo: $(READY)  ## Draw sample data, train two models in parallel, register the better one as champion
	@echo "Making the data, or checking that it is up to date"
	python -m pipelines.stages.inputs
	dvc repro --quiet
	fer train vgg13_small swin_nr_fpdls_tiny

test: $(READY)  ## Run all tests but the soak tests, in two processes; on the real FER+ too if FERPLUS_DIR is set
	python -m pytest -n 2 --dist loadfile -m "not soak"

test-soak: $(READY)  ## Run the soak tests: many runs, processes killed again and again; minutes each
	python -m pytest -m soak

test-fast: $(READY)  ## Run the tests that need no servers, no Ray and no real data
	python -m pytest -m "not slow and not soak"

gpu: $(READY)  ## On a machine with a GPU: the tests of it, then its speed
	python -m pytest tests/test_gpu.py
	python -m benchmarks --only recorded
	python -m benchmarks --only published

bench: $(READY)  ## Measure the speed of each part next to a plain reference
	python -m benchmarks

lint: $(READY)  ## Check style, imports and types
	ruff check .
	ruff format --check .
	mypy

format: $(READY)  ## Format the code
	ruff check --fix .
	ruff format .

clean:  ## Remove all outputs but the installation: data, runs, sweeps, exports, logs, MLflow and Prefect databases
	rm -rf data/sets data/runs data/folds data/sweeps data/logs exports dvc_plots mlflow.db mlruns mlartifacts .prefect
