# PYTHON=python3.13 selects the Python version. Without it, an existing environment is kept, or python3 creates one.
VENV ?= .venv
BIN := $(VENV)/bin
ifdef PYTHON
override PYTHON := $(or $(shell .ci/find_python $(PYTHON)),$(PYTHON))
else
override PYTHON := $(shell $(BIN)/python -c '' 2>/dev/null && echo $(BIN)/python || echo python3)
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
INSTALLED := $(VENV)/installed-$(VERSION)
LOWEST := .venv-lowest
DEMO := runs/digits
# One test process per core, at most 8; the tests of a file run in the same process, in the order of tests/shards.py.
PARALLEL := -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
# make test-slow SHARD=k/N runs the k-th of N parts.
SHARD := 1/1
# What a change of versions breaks first: checkpoints, data sources, a complete run of training and evaluation.
SHORT := tests/models/test_norm.py tests/data/test_digits.py tests/data/test_sources.py \
	tests/runs/test_checkpoints.py tests/training/test_optimizer.py tests/runs/test_writers.py \
	tests/test_versions.py tests/test_evaluate.py tests/config/test_loading.py tests/test_init.py

.PHONY: help demo study test test-medium test-slow test-all test-lowest docs lint format clean

help:
	@echo "make demo         train HGA on handwritten digits, evaluate it, say where to look"
	@echo "make study        compare three attentions on handwritten digits, 3 seeds each; resumes if it was stopped"
	@echo "make test         the style and the quick tests"
	@echo "make test-medium  the tests that take up to a minute: whole runs, commands, several processes"
	@echo "make test-slow    the slow tests; SHARD=k/N for the k-th of N parts"
	@echo "make test-all     all of these"
	@echo "make test-lowest  a short set of tests on Python 3.11 with the lowest versions of requirements.txt"
	@echo "make docs         the documentation as a web site, site/index.html; broken links are errors"
	@echo "make lint         check the style;  make format  correct it"
	@echo "make clean        remove the environments and the caches (not your runs)"
	@echo "PYTHON=python3.13 selects the Python version; an environment of another version is replaced"

# The environment. An interrupted installation leaves no stamp and is repeated. The version in the name of the stamp
# shows whether the environment was made by another Python.
$(INSTALLED): requirements.txt
	@[ -n "$(VERSION)" ] || { echo "error: there is no $(PYTHON) here; try: make PYTHON=python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.13 ...")'
	@$(BIN)/python -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null \
		|| { echo "making $(VENV) with Python $(VERSION) ..."; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing requirements.txt into $(VENV): 115 packages, 1.7 GB, silent for a few minutes ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python train.py --config=configs/digits.py --workdir=$(DEMO)
	@$(BIN)/python evaluate.py --workdir=$(DEMO) --checkpoint=latest
	@echo "see the curves: $(BIN)/tensorboard --logdir=$(DEMO)    train afresh: rm -r $(DEMO) && make demo"

# The first command prepares the digits; both take one to three minutes. A killed study resumes.
study: $(INSTALLED)
	@$(BIN)/python -m hga_flax study studies/smoke.py --workers=2
	@$(BIN)/python -m hga_flax report studies/smoke.py --save=runs/studies/smoke/report

test: $(INSTALLED) lint
	@$(BIN)/python -m pytest $(PARALLEL) -m "not medium and not slow"

test-medium: $(INSTALLED)
	@$(BIN)/python -m pytest $(PARALLEL) -m "medium and not slow"

# TensorFlow prepares ImageNet in one test, Pillow is the reference in another, nbclient runs the notebook, and the
# others provide buckets on this machine.
$(INSTALLED)-slow: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "tensorflow; python_version < '3.14'" pillow \
		"nbclient>=0.10,<1" "ipykernel>=7,<8" \
		"gcsfs>=2026.9,<2027" "s3fs>=2026.9,<2027" "moto[server]>=5.2,<6" gcp-storage-emulator
	@touch $@

test-slow: $(INSTALLED)-slow
	@$(BIN)/python -m pytest $(PARALLEL) -m slow --shard=$(SHARD)

test-all: $(INSTALLED)-slow lint
	@$(BIN)/python -m pytest $(PARALLEL) -m ""

$(LOWEST)/installed: requirements.txt
	@test -n "$$(.ci/find_python python3.11)" || { echo "error: Python 3.11 is needed for the lowest versions"; exit 1; }
	@$$(.ci/find_python python3.11) -m venv --clear $(LOWEST)
	@echo "installing the lowest versions of requirements.txt into $(LOWEST) ..."
	@sed -E 's/#.*//; s/>=([^,]+),<[^ ]+/==\1/' requirements.txt > $(LOWEST)/requirements.txt
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOWEST)/requirements.txt
	@touch $@

test-lowest: $(LOWEST)/installed
	@$(LOWEST)/bin/python -m pytest $(PARALLEL) $(SHORT)

docs: $(INSTALLED)
	@$(BIN)/zensical build --clean --strict

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && $(BIN)/mypy --no-error-summary

format: $(INSTALLED)
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

clean:
	@rm -rf $(VENV) $(LOWEST) .cache .pytest_cache .ruff_cache .mypy_cache site
