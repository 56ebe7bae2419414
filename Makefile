# make quickstart and make test work from a clean clone: both install into .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed
RECIPE ?= recipes/quickstart.yaml
SEEDS ?= 42

.PHONY: install quickstart test test-long test-gpu lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja -c constraints.txt
	$(BIN)/python -m pip install --quiet "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,dev]" -c constraints.txt
	touch $(STAMP)

quickstart: $(STAMP)
	for seed in $(SEEDS); do $(BIN)/flowgrove train $(RECIPE) --set run.seed=$$seed --out runs/quickstart-$$seed || exit 1; done

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not long" --durations=10

test-long: $(STAMP)
	mkdir -p test-results
	$(BIN)/python -m pytest -m "not gpu" -v --junitxml=test-results/$$(date +%Y-%m-%d).xml

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
