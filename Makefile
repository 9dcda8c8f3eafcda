# make run: the whole thing, from nothing to answers.  make test: everything that must hold.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test check format docs clean

run: $(STAMP)
	$(BIN)/smol pull
	$(BIN)/smol run sample_inputs/queries.jsonl
	@echo "The answers are in sample_inputs/queries.results.jsonl"

test: check
	$(BIN)/pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m tools.reference

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,parquet,ray,report]'
	touch $@
