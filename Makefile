# The targets a newcomer guesses. Each builds what it needs; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint fuzz mutants bench-smoke wheel clean

demo: $(VENV)/installed  ## real text by tree speculative decoding, checked against plain decoding
	$(BIN)/dynatree models install
	$(BIN)/dynatree generate --compare "Summarise this text and quote it where you can: The committee met on \
	Tuesday to discuss the new bridge. The new bridge will cross the river north of the old bridge. The committee \
	agreed that it should carry trams, and that the old bridge should be kept for people on foot."

test: $(VENV)/installed  ## all tests; those on the default model want `dynatree models install`, which this does
	$(BIN)/dynatree models install
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/installed  ## thousands of random generations against generate(), about five minutes
	$(BIN)/python tests/fuzz.py

mutants: $(VENV)/installed  ## deliberate bugs, each of which the tests have to notice
	$(BIN)/python tests/mutants.py

bench-smoke: $(VENV)/installed  ## what trees are worth on the default model, and where the time goes
	$(BIN)/dynatree models install
	$(BIN)/python -m dynatree_bench.smoke

wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "DynaTree needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
