# make setup      create .venv; repeated when pyproject.toml or constraints.txt change
# make demo       prepare a corpus, train and evaluate a model, generate a sample, plot the run
# make demo-images   the same with pictures, of Fashion-MNIST: Debian's dataset-fashion-mnist, or any
#                    folder with its four files, as IMAGES=FOLDER
# make transformers   create environments with transformers 4 and 5, for tests of exports
# make test       run the fast tests                    make test-all   run all tests
# make lint       run ruff and mypy                     make check      lint and test
# make docs       build the site in build/site          make coverage   coverage of the fast tests,
#                                                                       at least the floor
#
# WORKERS is the number of parallel test processes.
# PYTHON is a Python 3.11 or 3.12; PIP_FLAGS are passed to pip (for example --index-url).

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
RUN := runs/quickstart
IMAGES ?= /usr/share/datasets/fashion-mnist
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

TRANSFORMERS := .venv/transformers4/.ready .venv/transformers5/.ready

.PHONY: setup transformers demo demo-images test test-slow test-all lint check docs coverage

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	"Python %d.%d is not supported; make setup PYTHON=python3.11 (or 3.12)" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

# Layers over .venv: packages that they lack are imported from there.
transformers: $(TRANSFORMERS)

.venv/transformers%/.ready: constraints-transformers%.txt $(READY)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -c 'import site; print("import site;", *(f"site.addsitedir({p!r});" for p in \
	site.getsitepackages()))' > "$$(echo $(@D)/lib/python3*/site-packages)/base.pth"
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet $(PIP_FLAGS) --no-deps -r $<
	@touch $@

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

test-all: setup
	$(PYTEST)

coverage: setup
	rm -rf build/coverage
	$(BIN)/python -m coverage run -m pytest -n $(WORKERS) --dist worksteal -m "not slow"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

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

demo-images: setup
	@test -d $(IMAGES) || { echo "$(IMAGES) is missing; install Debian's package \
	dataset-fashion-mnist, or name a folder with the four files of Fashion-MNIST: \
	make demo-images IMAGES=FOLDER" >&2; exit 2; }
	$(BIN)/megarecur prep images $(IMAGES) --out data/fashion_mnist --class-names \
	"T-shirt,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
	$(BIN)/megarecur prep inspect data/fashion_mnist/train --draw data/fashion_mnist/pictures.png
	$(BIN)/megarecur train configs/images.yaml
	$(BIN)/megarecur eval runs/fashion_mnist --draw runs/fashion_mnist/plots
	$(BIN)/megarecur plot runs/fashion_mnist
	@echo
	@echo "The run:      runs/fashion_mnist (config.yaml, metrics.jsonl, checkpoints/)"
	@echo "Its pictures: runs/fashion_mnist/plots"
