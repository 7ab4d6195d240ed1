# make setup      the environment, in .venv; done again when pyproject.toml or constraints.txt change
# make demo       a corpus, a trained model, its pictures, a sample
# make test       every test but the slow ones          make test-all   every test
# make lint       ruff and mypy                          make check      lint and test
#
# WORKERS run tests side by side.
# PYTHON is any Python 3.11 or 3.12; PIP_FLAGS reach pip (such as --index-url for another torch build).

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
RUN := runs/quickstart
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: setup demo test test-slow test-all lint check

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	"Python %d.%d is not supported; make setup PYTHON=python3.11 (or 3.12)" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow || test $$? -eq 5  # 5: there are none

test-all: setup
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

demo: setup
	$(BIN)/megarecur prep quickstart
	$(BIN)/megarecur check configs/quickstart.yaml
	$(BIN)/megarecur train configs/quickstart.yaml
	$(BIN)/megarecur eval $(RUN)
	$(BIN)/megarecur generate $(RUN) "def main("
	$(BIN)/megarecur plot $(RUN)
	@echo
	@echo "The run:      $(RUN) (config.yaml, metrics.jsonl, checkpoints/)"
	@echo "Its pictures: $(RUN)/plots"
	@echo "TensorBoard:  $(BIN)/tensorboard --logdir $(RUN)/tensorboard"
