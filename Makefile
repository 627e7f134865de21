# What people do in a checkout. `make` alone lists it.

# the tiny VLM is too small for more threads; with one, `make demo` is seed 0 of `make study` at the same commit, to the last digit
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY = passive
VISMEM = .venv/bin/vismem
ENVIRONMENTS = deploy/environments
INSTALLED = .venv/.installed
SERVING = .venv-serving/.installed
COMPILED = .venv/.compiled

.PHONY: help try setup serving demo smoke nlvr pipeline study tiny-vlm test lint docs ui serve playground stack images locks \
	test-containers mutants

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 17

try: $(INSTALLED)  ## half a minute once packages of 2.5 GB are installed: ask the tiny VLM about example images, with and without memory
	@$(VISMEM) try

setup: $(INSTALLED) $(SERVING) $(COMPILED)  ## make both Python environments: 3 GB on disk, 9 GB with a GPU; PYTHON= names the Python

serving: $(SERVING)  ## make the environment that Triton runs in

demo: setup  ## the whole job: from visual questions to a released model that answers over Triton
	$(VISMEM) repro
	$(VISMEM) summary

smoke: setup  ## the same at toy size, in runs/smoke/
	$(VISMEM) repro --profile smoke
	$(VISMEM) summary --profile smoke

nlvr: $(INSTALLED)  ## train and score on NLVR, DATA= its folder: a base for wide pictures, its memory, the report; on the CPU
	@test -e data/nlvr || test -d '$(DATA)' || { echo "name NLVR's folder: make nlvr DATA=FOLDER (docs/results/nlvr.md says which)"; exit 1; }
	@test -e data/nlvr || ln -s "$$(realpath '$(DATA)')" data/nlvr
	@test -e runs/wide-vlm || .venv/bin/python -m recipes.tiny_vlm --wide --out runs/wide-vlm
	$(VISMEM) repro --profile nlvr evaluate

PROFILE ?= smoke
pipeline: setup  ## the Kubeflow pipeline on this machine, in runs/pipeline/; PROFILE= for the full size
	.venv/bin/python pipelines/run_local.py --profile '$(PROFILE)'

study: $(INSTALLED)  ## the evidence: every arm with three seeds, two hours on 2 cores; resumes
	.venv/bin/python -m recipes.study --write docs/results/embedded.md

tiny-vlm: $(INSTALLED)  ## retrain the tiny VLM of assets/ and its memory; four hours
	.venv/bin/python -m recipes.tiny_vlm --seed 0 --out assets/tiny-vlm --memory assets/tiny-vlm-memory

# A file at a time: its tests share what they make. The longest files come first, so that no process ends alone, and there
# is one more process than cores, since some tests wait for servers.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 4)))
test: setup  ## all tests, in WORKERS= processes; `.venv/bin/pytest FILE` runs some of them in one
	.venv/bin/python -m pytest --numprocesses '$(WORKERS)' --dist loadfile --no-loadscope-reorder

mutants: $(INSTALLED)  ## break the code in many small ways and count what no test notices; MODULE= for one, two hours for all
	.venv/bin/python tests/mutation/run.py $(MODULE)

lint: $(INSTALLED)  ## style and types, as .pre-commit-config.yaml lists them
	.venv/bin/pre-commit run --all-files

docs: $(INSTALLED)  ## the documentation as a site, in site/; `.venv/bin/mkdocs serve` shows it while you write
	.venv/bin/mkdocs build --strict

ui: $(INSTALLED)  ## open MLflow and print the model's page
	$(VISMEM) ui

serve: setup  ## serve the deployed model until Ctrl-C
	$(VISMEM) serve

playground: $(INSTALLED)  ## ask the tiny VLM in the browser, until Ctrl-C; MODEL= for another
	$(VISMEM) playground $(if $(MODEL),--model '$(MODEL)')

stack: $(INSTALLED)  ## PostgreSQL, an S3 server and MLflow on both, until Ctrl-C
	$(VISMEM) stack

images:  ## build both container images; TORCH=cpu: vismem-train without CUDA (deploy/docker/README.md)
	deploy/docker/build.sh

locks: $(INSTALLED)  ## rewrite the lock files after a change of requirements; UPGRADE=1 for the newest versions
	PATH="$$PATH:.venv/bin" $(ENVIRONMENTS)/locks.sh

test-containers: setup  ## build both images, run the smoke pipeline and the pods of a cluster in them, ask the served model
	.venv/bin/python -m pytest tests/containers

$(INSTALLED): pyproject.toml $(wildcard $(ENVIRONMENTS)/*)
	@$(ENVIRONMENTS)/setup.sh .venv
	@touch $@

# apart, because Triton's Python backend needs numpy < 2; without torch
$(SERVING): deploy/triton/requirements.txt $(ENVIRONMENTS)/serve.lock $(ENVIRONMENTS)/setup.sh
	@PYTHON="$${SERVING_PYTHON:-$$PYTHON}" $(ENVIRONMENTS)/setup.sh .venv-serving
	@touch $@

# Python keeps the modules that it has compiled, unless it may not: then every process of a run would compile them anew
$(COMPILED): $(INSTALLED) $(SERVING)
	@[ -z "$$PYTHONDONTWRITEBYTECODE" ] || .venv/bin/python -m compileall -q -j 0 .venv .venv-serving > /dev/null 2>&1 || true
	@touch $@
