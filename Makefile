# The two commands of the README, and those beside them. `make` alone lists all.
PYTHON ?= python3
SERVING_PYTHON ?= $(PYTHON)
PIP_FLAGS ?=

# the tiny VLM is too small for more threads; with one, `make demo` is seed 0 of `make study`, to the last digit
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY = passive
PIP = -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
VISMEM = .venv/bin/vismem
INSTALLED = .venv/.installed
SERVING = .venv-serving/.installed

.PHONY: help setup serving demo smoke pipeline study tiny-vlm test lint ui serve stack images locks test-containers

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 17

setup: $(INSTALLED) $(SERVING)  ## make both Python environments

serving: $(SERVING)  ## make the environment that Triton runs in

demo: setup  ## the whole job: from visual questions to a released model that answers over Triton
	$(VISMEM) repro
	$(VISMEM) summary

smoke: setup  ## the same at toy size, in runs/smoke/
	$(VISMEM) repro --profile smoke
	$(VISMEM) summary --profile smoke

PROFILE ?= smoke
pipeline: setup  ## the Kubeflow pipeline on this machine, in runs/pipeline/; PROFILE= for the full size
	.venv/bin/python pipelines/run_local.py --profile '$(PROFILE)'

study: $(INSTALLED)  ## the evidence: every arm with three seeds, one to two hours on 2 cores; resumes
	.venv/bin/python -m recipes.study --profile full --write docs/results/embedded.md

tiny-vlm: $(INSTALLED)  ## retrain the tiny VLM of assets/ and its memory; about half an hour
	.venv/bin/python -m recipes.tiny_vlm --seed 0 --out assets/tiny-vlm --memory assets/tiny-vlm-memory

test: setup  ## all tests
	.venv/bin/python -m pytest

lint: $(INSTALLED)  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

ui: $(INSTALLED)  ## open MLflow and print the model's page
	$(VISMEM) ui

serve: setup  ## serve the deployed model until Ctrl-C
	$(VISMEM) serve

stack: $(INSTALLED)  ## PostgreSQL, an S3 server and MLflow on both, until Ctrl-C
	$(VISMEM) stack

images:  ## build both container images; TORCH=cpu for machines without a GPU (deploy/docker/README.md)
	deploy/docker/build.sh

locks: setup  ## rewrite the images' lock files after a change of requirements; needs uv
	deploy/docker/locks.sh

test-containers: setup  ## build both images, run the smoke pipeline in containers and ask the served model
	.venv/bin/python -m pytest tests/containers

# torch first and pinned: so pip takes one build of it, and everything else is resolved around that
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) torch==2.13.0
	.venv/bin/python $(PIP) -e '.[pipeline,export,kubeflow,stack,dev]'
	touch $@

# apart, because Triton's Python backend needs numpy < 2; without torch
$(SERVING): deploy/triton/requirements.txt
	$(SERVING_PYTHON) -m venv .venv-serving
	.venv-serving/bin/python $(PIP) -r deploy/triton/requirements.txt
	touch $@
