# Two commands on a fresh machine: `make run` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := core scenarios strategies client server
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install run test check links lint types floors clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

run: install
	$(BIN)/fedstrata run

test: check
	$(BIN)/python -m pytest -q

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

clean:
	rm -rf $(VENV) .links build dist *.egg-info
