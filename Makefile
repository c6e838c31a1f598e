# One entry point for people: make setup | run | test | core | lint | bench | up | docs
PYTHON ?= python3
UV ?= uv
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
APT := python3-venv bubblewrap nftables iproute2 libseccomp2 openssl
PEERS := .peers
WORKERS ?= 2

.PHONY: setup run test core lint bench peers up docs lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cipherfleet needs Python 3.11 or newer (PYTHON=...)"; exit 1; }
	@sh scripts/system-packages.sh $(APT)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install python3-venv, or give another PYTHON=..." >&2; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: setup
	$(BIN)/cipherfleet demo

up: setup
	$(BIN)/cipherfleet up

lint: setup
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

core: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow and not alone"
	$(BIN)/python -m pytest -q -m "alone and not slow"

test: lint
	@$(MAKE) -s peers || echo "the peers could not be installed: the test that needs them is skipped" >&2
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n $(WORKERS) --dist loadfile -m "not alone"
	$(BIN)/python -m coverage run -m pytest -m alone
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

bench: setup
	$(BIN)/cipherfleet bench network $(if $(wildcard $(PEERS)/.installed),--peers $(PEERS)/bin/python)
	$(BIN)/cipherfleet bench lifecycle
	$(BIN)/cipherfleet bench isolation
	$(BIN)/cipherfleet bench keys
	$(BIN)/cipherfleet bench figure8

# What `bench network` is compared with, in an environment of its own; SoftHSM2 and p11-kit are packages of the system.
peers: $(PEERS)/.installed

$(PEERS)/.installed: requirements-peers.lock
	@sh scripts/system-packages.sh softhsm2 p11-kit p11-kit-modules
	@$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-peers.lock
	@touch $@

docs: setup
	$(BIN)/python scripts/reference.py

lock:
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --group dev --extra build pyproject.toml -o requirements.lock
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --group peers -o requirements-peers.lock

clean:
	rm -rf $(VENV) $(PEERS) .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
