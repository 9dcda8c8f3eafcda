# make run: install smol, pull the model, answer the sample queries.  make test: all checks.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test check format docs kernels wheels sanitize clean

run: kernels
	$(BIN)/smol pull
	$(BIN)/smol run sample_inputs/queries.jsonl
	@echo "The answers are in sample_inputs/queries.results.jsonl"

# One process per core, at most four; the tests of a file share a process and its fixtures.
test: check kernels
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Compile the kernels that this CPU can run, if their source has changed.
kernels: $(STAMP)
	$(BIN)/python -m tools.build_kernels

# Build wheels for all platforms, cross-compiled with ziglang.
WHEELS := linux-x86_64 linux-aarch64 macos-arm64 macos-x86_64 windows-x86_64
wheels: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt hatchling ziglang
	for target in $(WHEELS); do SMOL_WHEEL_TARGET=$$target $(BIN)/hatchling build -t wheel || exit 1; done

# The kernels under the address, undefined-behaviour and thread sanitizers.
STEPS ?= 10000
DRIVER := $(CC) -std=gnu11 -O2 -g -march=native -ffp-contract=off -Wno-psabi -DSOURCE_HASH='"x"' \
	-DBF16_WEIGHTS=1 -DBF16_PRODUCTS=0 tests/kernel_driver.c smolcli/engine/native/team.c -pthread -lm
sanitize:
	mkdir -p build
	$(DRIVER) -fsanitize=address,undefined -fno-sanitize-recover=undefined -o build/driver-address
	build/driver-address stress $(STEPS) 1
	$(DRIVER) -fsanitize=thread -o build/driver-thread
	build/driver-thread stress $(STEPS) 2

docs: $(STAMP)
	$(BIN)/python -m tools.reference

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,parquet,ray,report]'
	touch $@
