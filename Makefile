# make quickstart and make test work from a clean clone: both install into .venv first.
PYTHON ?= python3
PYTHON312 ?= python3.12
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed
RECIPE ?= recipes/quickstart.yaml
SEEDS ?= 42
# Workers of one thread each: two threads on one test finish little sooner than one. One without work takes some of the
# other's, whose tests may be the long ones.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# Triton's interpreter is slow and cannot share a process with its compiler: make test runs the ops in it once more, make test-long every kernel test.
INTERPRETED := tests/kernels/test_op_flow_step.py tests/kernels/test_op_flow_logprob.py tests/kernels/test_op_grpo_loss.py tests/kernels/test_op_clean_estimate.py tests/kernels/test_noise.py
# what tests have measured is noted with them
NOTED := -o junit_family=xunit1
ALL_INTERPRETED := tests/kernels/test_op_*.py tests/kernels/test_noise.py tests/kernels/test_every_backend.py

.PHONY: install quickstart test test-long test-gpu gpu-kit bench figures lint format docs clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja -c constraints.txt
	$(BIN)/python -m pip install --quiet "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,dev]" -c constraints.txt
	touch $(STAMP)

quickstart: $(STAMP)
	for seed in $(SEEDS); do $(BIN)/flowgrove train $(RECIPE) --set run.seed=$$seed --out runs/quickstart-$$seed || exit 1; done

test: $(STAMP)
	$(PYTEST) -m "not gpu and not long" --durations=10
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu and not long" -k triton $(INTERPRETED)

# tests/LONG.md tells what came out, also where a test has failed.
test-long: $(STAMP)
	mkdir -p test-results
	results=test-results/$$(date +%Y-%m-%d); \
	$(PYTEST) -m "not gpu" -v $(NOTED) --junitxml=$$results.xml; first=$$?; \
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu" -v -k triton $(ALL_INTERPRETED) $(NOTED) --junitxml=$$results-interpreted.xml; second=$$?; \
	$(BIN)/python profiling/long_tests.py $$results.xml $$results-interpreted.xml && test $$first = 0 && test $$second = 0

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# What profiling/gpu_check.py needs on a GPU machine without network, in .gpu-kit/.
gpu-kit:
	$(PYTHON) profiling/gpu_kit.py --python $(PYTHON312)

bench: $(STAMP)
	$(BIN)/python profiling/bench_ops.py

# Plots, tables and numbers of README and docs from profiling/figures/*.csv. RUN=runs/quickstart-42 takes the quickstart's
# figures from that run, PREDICTIONS=1 predicts memory and time of shipped recipes anew.
figures: $(STAMP)
	$(BIN)/python profiling/make_figures.py $(if $(RUN),--run $(RUN)) $(if $(PREDICTIONS),--predictions)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are written from the code.
docs: $(STAMP)
	$(BIN)/flowgrove recipe --markdown > docs/recipe.md
	$(BIN)/flowgrove metrics --markdown > docs/metrics.md

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info kernels/flowgrove_kernels/*.so
