# Two commands on a fresh machine: `make run` and `make test`. Both set everything up first.
# Needed: Linux, Python 3.11 or newer with venv (another one: `make run PYTHON=python3.12`).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := core scenarios strategies client server benchmarks
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install run test check links lint types floors clean deploy-demo deploy-down test-docker

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) must be Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

run: install
	$(BIN)/fedstrata run

test: check     # on up to four cores; tests/conftest.py says which tests share one
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --no-loadscope-reorder

check: lint types floors

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

links:          # how mypy sees that the folder x/ is the package fedstrata.x
	@mkdir -p .links/fedstrata
	@for folder in $(FOLDERS); do ln -sfn ../../$$folder .links/fedstrata/$$folder; done

types: install links
	$(BIN)/mypy

floors: install
	$(BIN)/lint-imports --no-cache

COMPOSE := $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
DEMO := $(COMPOSE) -p fedstrata-demo -f docker-compose.yml -f docker-compose.demo.yml

deploy-demo:    # three clients in containers, TLS and keys, the embedded data; its table, and the run's own exit code
	@DOCKER_BUILDKIT=$${DOCKER_BUILDKIT:-0} $(DEMO) build
	@$(DEMO) up --detach --no-build
	@$(DEMO) logs --follow --no-color run
	@exit $$(docker wait $$($(DEMO) ps --all --quiet run))

deploy-down:    # ends it and removes its volumes: keys, data, runs
	@$(DEMO) down --volumes --timeout 5

test-docker: install    # builds the image and breaks a deployment in every way that docs/deploy.md promises to survive
	FEDSTRATA_DOCKER=1 $(BIN)/python -m pytest -q tests/docker

clean:
	rm -rf $(VENV) .links build dist *.egg-info
