# Everything that a newcomer or a CI machine types. Python 3.11 and make are all it needs.
#   make demo               VLV and MASSV on the miniature world; leaves runs/demo/report.html
#   make demo SCALE=smoke   the same in a few minutes, without thresholds
#   make results            all figures of the README again; resumable, hours
#   make test               the fast tests
#   make plan               compiles for TPU pods what of docs/plans is stale; needs libtpu
#   make test-plans         lowers all jobs of docs/plans, compiles four small ones for a TPU
#   make plan-check         fails if a plan in docs/plans is stale; compiles nothing
#   make chaos              kills every kind of job 200 times; resumable, hours on two cores
PYTHON ?= python3.11
VENV ?= .venv
SCALE ?= full
WORKERS ?= 2
# On Linux, torch may bring gigabytes of CUDA; name PyTorch's CPU index to avoid them:
#   make install-test TORCH_INDEX=<address of the CPU index>
TORCH_INDEX ?=
TORCH = torch==2.13.0

BIN = $(VENV)/bin
RUN = HF_HUB_OFFLINE=1 $(BIN)/python

TARGETS = install install-test install-beam install-tpu test test-slow test-plans lint plan \
  plan-check demo results chaos miniature clean
.PHONY: help $(TARGETS)

help:
	@sed -n 's/^#   //p' Makefile
	@echo "targets: $(TARGETS)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What runs needs no PyTorch; the tests compare against it.
install: $(VENV)/.installed
$(VENV)/.installed: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# torch first and pinned, so that no other package chooses it. pycocoevalcap without its
# dependencies: they are for COCO's own evaluation, which compiles pycocotools and runs Java.
install-test: $(VENV)/.installed-test
$(VENV)/.installed-test: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[test]' $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps pycocoevalcap
	touch $(VENV)/.installed $@

# Apache Beam (core_jax.data.prepare) wants older releases of some packages than the tests have: it
# is installed on top of them, in an environment of its own.
install-beam: .venv-beam/.installed
.venv-beam/.installed: setup.py | $(VENV)/.installed-test
	$(PYTHON) -m venv .venv-beam
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > "$$(.venv-beam/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	.venv-beam/bin/python -m pip install --quiet 'apache-beam>=2.70,<3'
	touch $@

# The TPU's compiler of this jax, in an environment of its own on top of the tests': where it is
# installed, jax looks for a TPU in every command that does not say otherwise.
install-tpu: .venv-tpu/.installed
.venv-tpu/.installed: setup.py | $(VENV)/.installed-test
	$(PYTHON) -m venv .venv-tpu
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > "$$(.venv-tpu/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	.venv-tpu/bin/python -m pip install --quiet 'jax[tpu]'
	touch $@

# Every job of docs/plans lowered, four small ones compiled; what is stale is only told. Workers share
# the compiler, which by itself lets one process in, as it would to a TPU.
test-plans: install-tpu
	HF_HUB_OFFLINE=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 .venv-tpu/bin/python -m pytest -n $(WORKERS) -m slow tests/launch

test: install-test
	$(RUN) -m pytest -n $(WORKERS) -m "not slow"

test-slow: install-test
	$(RUN) -m pytest -n $(WORKERS) -m slow

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

plan: install
	$(RUN) -m launch.plans

plan-check: install
	$(RUN) -m launch.plans --check

demo: install
	$(RUN) -m miniature.demo --scale=$(SCALE)

# The figures of the README: hours; what is finished is kept, so stop it when you like.
results: install
	$(RUN) -m miniature.results --scale=$(SCALE)

# Every kind of job, killed, starved and damaged; what is finished is kept, so stop it when you like.
KILLS ?= 200
chaos: install-test
	$(RUN) -m tests.chaos --root=runs/chaos --kills=$(KILLS) --document=docs/chaos.md

# Trains the stand-ins again (some two and a half hours on two cores); they are shipped already.
miniature: install
	$(RUN) -m miniature.pretrain

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache runs/demo-smoke
	find . -name __pycache__ -not -path './$(VENV)*' -prune -exec rm -rf {} +
