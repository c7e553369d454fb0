PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/digits
# Tests run in as many processes as there are cores, at most 8; those of a file stay together.
PARALLEL := -n auto --maxprocesses=8 --dist=loadfile

.PHONY: help demo study test test-all docs lint format clean

help:
	@echo "make demo      train HGA on handwritten digits, evaluate it, say where to look"
	@echo "make study     compare three attentions on handwritten digits, 3 seeds each; go on where it stopped"
	@echo "make test      the test suite"
	@echo "make test-all  the test suite with the slow tests"
	@echo "make docs      the documentation as a web site, site/index.html; broken links are errors"
	@echo "make lint      check the style;  make format  mend it"
	@echo "make clean     remove the environment and the caches (not your runs)"

# The environment. An interrupted installation leaves no stamp and is taken up again.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/python train.py --config=configs/digits.py --workdir=$(DEMO)
	@$(BIN)/python evaluate.py --workdir=$(DEMO) --checkpoint=latest
	@echo "see the curves: $(BIN)/tensorboard --logdir=$(DEMO)    train afresh: rm -r $(DEMO) && make demo"

# The digits are prepared by the first of the two; a minute or three in all. Killed, it goes on where it stopped.
study: $(VENV)/installed
	@$(BIN)/python -m hga_flax study studies/smoke.py --workers=2
	@$(BIN)/python -m hga_flax report studies/smoke.py --save=runs/studies/smoke/report

test: $(VENV)/installed lint
	@$(BIN)/python -m pytest $(PARALLEL)

# TensorFlow prepares ImageNet in one test, Pillow is the reference of another, the rest are buckets on this machine.
test-all: $(VENV)/installed lint
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check tensorflow pillow \
		"gcsfs>=2026.9,<2027" "s3fs>=2026.9,<2027" "moto[server]>=5.2,<6" gcp-storage-emulator
	@$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

docs: $(VENV)/installed
	@$(BIN)/zensical build --clean --strict

lint: $(VENV)/installed
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .

format: $(VENV)/installed
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

clean:
	@rm -rf $(VENV) .cache .pytest_cache .ruff_cache site
