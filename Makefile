# The targets a newcomer guesses. Each builds what it needs; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# processes that the tests are spread over
JOBS ?= 2

.PHONY: demo test test-gpu test-matrix test-clients lint docs viewer fuzz mutants bench-smoke wheel release-check lock clean

demo: $(VENV)/installed  ## real text by tree speculative decoding, checked against plain decoding
	$(BIN)/dynatree models install
	$(BIN)/dynatree generate --compare "Summarise this text and quote it where you can: The committee met on \
	Tuesday to discuss the new bridge. The new bridge will cross the river north of the old bridge. The committee \
	agreed that it should carry trams, and that the old bridge should be kept for people on foot."

test: $(VENV)/installed  ## all tests; those on the default model want `dynatree models install`, which this does
	$(BIN)/dynatree models install
	DYNATREE_LOCKED=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-gpu: $(VENV)/installed  ## the tests that need a CUDA device, each by its name; the others see none
	DYNATREE_TEST_GPU=1 $(BIN)/python -m pytest -v -m gpu

test-matrix: $(VENV)/installed  ## what depends on transformers, with its oldest supported, 5.23.0 and newest release
	$(BIN)/python .ci/matrix.py

test-clients: $(VENV)/installed  ## transformers serve, lm-eval, LangChain, LlamaIndex, in an environment of their own
	$(BIN)/python .ci/clients.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## the documentation site in site/, with warnings as errors
	$(BIN)/python .ci/docs_build.py

viewer:  ## the page of `dynatree view` anew from viewer/, with node and npm
	cd viewer && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error && npm run --silent build

fuzz: $(VENV)/installed  ## thousands of random generations and batches against generate(), some fifteen minutes
	$(BIN)/python tests/fuzz.py

mutants: $(VENV)/installed  ## deliberate bugs, each of which the tests have to notice
	$(BIN)/python tests/mutants.py

bench-smoke: $(VENV)/installed  ## what trees are worth on the default model, and where the time goes
	$(BIN)/dynatree models install
	$(BIN)/dynatree bench smoke --out bench-results/smoke
	$(BIN)/dynatree bench memory --out bench-results/memory

wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

release-check: $(VENV)/installed  ## sdist and wheel in dist/, checked, installed into a clean environment and used
	$(BIN)/python .ci/release.py

lock: $(VENV)/installed  ## constraints.txt anew, with the newest release of everything that is not held
	$(BIN)/python .ci/lock.py

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) .ci/set_up.py $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
