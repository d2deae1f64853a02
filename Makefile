# Each target first makes the virtual environment .venv and installs what it needs; a failed install is tried again.
#
#   PYTHON=python3.12          another interpreter (3.10 or newer)
#   TORCH='torch==2.13.0 ...'  how pip is asked for torch, options included. Where pip's index offers CUDA wheels,
#                              name one with CPU wheels here to save gigabytes on a machine without a GPU.
#   WORKERS=0                  tests in one process. Otherwise there is one a core, 8 at most, or with a GPU just one.
#   VENV_FLAGS=--system-site-packages TORCH= CONSTRAINTS=
#                              use the torch and the packages that the machine already has

PYTHON ?= python3
VENV_FLAGS ?=
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
WORKERS ?= logical

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAIN := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# The models of the demo and the tests are tiny: a second thread makes them many times slower.
OMP_NUM_THREADS ?= 1
OMP_WAIT_POLICY ?= passive
export OMP_NUM_THREADS OMP_WAIT_POLICY

# Each worker runs its share in order, as the tests of a module have fixtures in common; one that is done takes half of
# what another has left.
TEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help install demo test compat bench lint clean
.NOTPARALLEL:

help:
	@echo "make demo     generate a video with and without the cache into demo/"
	@echo "make test     run the tests"
	@echo "make compat   run the tests of models and pipelines with older releases of diffusers"
	@echo "make bench    run the benchmarks"
	@echo "make lint     check style and format"
	@echo "make install  only make .venv, with all that the other targets need"
	@echo "make clean    remove what the targets made, .venv included"

demo: $(VENV)/demo.stamp
	$(BIN)/adacache-triton generate --out demo

test: $(VENV)/dev.stamp
	$(TEST)

# Older releases of diffusers lie in front of the environment's own, with what they need older than it has.
HTTPX := httpx httpcore h11 anyio sniffio idna certifi
WITH_0.36.0 := transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.1
WITH_0.40.0 := huggingface-hub==1.33.0
OLDER := 0.36.0 0.40.0

compat: $(OLDER:%=$(VENV)/diffusers-%/stamp)
	$(foreach v,$(OLDER),PYTHONPATH=$(VENV)/diffusers-$(v) $(TEST) tests/test_models.py tests/test_pipelines.py &&) true

$(VENV)/diffusers-%/stamp: $(VENV)/dev.stamp
	$(PIP) install -q --no-deps --target $(@D) diffusers==$* $(WITH_$*) $(HTTPX)
	touch $@

bench: $(VENV)/dev.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

install: $(VENV)/dev.stamp

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes alone, so that nothing later can change which build of it is taken. With TORCH= it must be there
# already: asked as a dependency, the newest would come, with gigabytes of CUDA libraries.
$(VENV)/torch.stamp:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV_FLAGS) $(VENV)
	$(PIP) install -q $(CONSTRAIN) 'pip>=22.3' 'setuptools>=77'
	$(if $(TORCH),$(PIP) install -q $(CONSTRAIN) $(TORCH),$(BIN)/python -c 'import torch')
	touch $@

# The demo runs without triton where torch brings none; the tests of the kernels need it.
$(VENV)/demo.stamp: EXTRAS := demo
$(VENV)/dev.stamp: EXTRAS := cpu,dev

# No build isolation: the setuptools just installed builds the package, not an unpinned one.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(CONSTRAINTS)
	$(PIP) install -q --no-build-isolation $(CONSTRAIN) -e '.[$(EXTRAS)]'
	touch $@
