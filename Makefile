# make repro   install, then reproduce the toy2d and digits suites; make repro-all   every variant of them too
# make test    install, then run the fast tests
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help repro repro-all test bench lint audit lock setup clean-runs

VENV := .venv
PYTHON := $(VENV)/bin/python
# named by what was installed: another lock or project file asks for another stamp, the same one installs nothing
STAMP := $(VENV)/installed-$(shell cat requirements.lock requirements-uv.lock pyproject.toml | cksum | cut -d' ' -f1)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export OMP_NUM_THREADS := 1
# dozens of short processes import the same packages: let Python keep what it compiled
unexport PYTHONDONTWRITEBYTECODE VIRTUAL_ENV PYTHONPATH PYTHONHOME

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

repro: $(STAMP)  ## reproduce the suites toy2d and digits through DVC
	@$(PYTHON) -m bench.repro

repro-all: $(STAMP)  ## the same with all other systems: DiffFlow, Schrodinger bridges, DDPM, NCSN, ...
	@$(PYTHON) -m bench.repro --all

test: $(STAMP)  ## run the fast tests
	@$(PYTHON) -m pytest -q -n 2 --dist loadfile

bench: $(STAMP)  ## run the performance cases
	@$(PYTHON) -m pytest -q --benchmark

lint: $(STAMP)  ## check style
	@ruff check .
	@ruff format --check .

audit: $(STAMP)  ## look the locked packages up among known vulnerabilities
	@$(PYTHON) .ci/audit

setup: $(STAMP)  ## create .venv and install the locked packages

lock: $(STAMP)  ## bring the locks up to date with requirements.in
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --upgrade requirements.in -o requirements.lock

clean-runs:  ## remove results and checkpoints of the runs (reports stay)
	@rm -rf runs .checkpoints

# uv installs much faster than pip; where it cannot reach the registry that pip is set up for, pip does it
$(STAMP):
	@set -eu; python=$$(command -v python3.11 || command -v python3 || true); \
	if [ -z "$$python" ] || ! "$$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then \
	  echo "Python 3.11 or newer is needed: no python3.11, and python3 is $$("$${python:-python3}" --version 2>&1 || true)" >&2; exit 2; fi; \
	[ -x $(PYTHON) ] || "$$python" -m venv $(VENV); \
	echo "installing the locked packages into $(VENV)"; \
	pip="$(PYTHON) -m pip --quiet --disable-pip-version-check"; \
	{ $$pip install --require-hashes -r requirements-uv.lock 2>/dev/null && \
	  uv pip install --quiet --require-hashes -r requirements.lock; } || \
	$$pip install --require-hashes -r requirements.lock; \
	$$pip install --no-deps --no-build-isolation --no-index -e .; \
	rm -f $(VENV)/installed-*; touch $@
