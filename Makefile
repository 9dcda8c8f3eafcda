# make run: install smol, pull the model, answer the sample queries.  make test: all checks.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test pytest check lint types format docs site kernels wheels dist-check sbom audit image deploy-check sanitize sanitize-address sanitize-thread sanitize-models clean

run: kernels
	$(BIN)/smol pull
	$(BIN)/smol run sample_inputs/queries.jsonl
	@echo "The answers are in sample_inputs/queries.results.jsonl"

# Without its cache, mypy takes one core for more than a minute, so it runs beside the tests.
test: lint
	@$(MAKE) --no-print-directory -j2 types pytest

# One process per core, at most four; the tests of a file share a process and its fixtures.
pytest: kernels
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

check: lint types

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
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

# Install the wheel into an empty environment without a compiler, and ask it a question.
dist-check: $(STAMP)
	tools/dist_check.sh $(BIN)/python

# The packages of an installed wheel, their licenses and dependencies, in CycloneDX format.
sbom: dist-check build/tools
	mkdir -p dist
	build/tools/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
		-o dist/smolcli.cdx.json build/dist-check/venv/bin/python

# Known vulnerabilities of the versions in constraints.txt; needs PyPI's JSON API or OSV.
audit: build/tools
	$(PYTHON) -m tools.audit build/tools/bin/pip-audit constraints.txt

build/tools:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet 'cyclonedx-bom>=7' 'pip-audit>=2.9'

# Build the container image from Debian packages and use it; needs root, buildah, podman and runc.
image:
	tools/container_test.sh

# Validate the manifests against Kubernetes' schemas, and what kubectl makes of them.
deploy-check: $(STAMP)
	$(BIN)/pip install --quiet 'kubernetes-validate>=1.37'
	$(BIN)/pytest -q tests/test_deploy.py
	mkdir -p build
	for name in base model-volume; do kubectl kustomize deploy/kubernetes/$$name > build/$$name.yaml \
		&& $(BIN)/kubernetes-validate --strict build/$$name.yaml || exit 1; done

# The kernels under the address, undefined-behaviour and thread sanitizers, and damaged models under the first two.
# 10,000 steps under the thread sanitizer take the better part of an hour; each seed is a run of its own, and one seed
# at a time is make sanitize-thread SEEDS=3.
STEPS ?= 2500
SEEDS ?= 1 2 3 4
EXAMPLES ?= 500
SANITIZED := -fsanitize=address,undefined -fno-sanitize-recover=undefined
DRIVER := $(CC) -std=gnu11 -O2 -g -march=native -ffp-contract=off -Wno-psabi -DSOURCE_HASH='"x"' \
	-DBF16_WEIGHTS=0 -DBF16_PRODUCTS=0 tests/kernel_driver.c smolcli/engine/native/team.c -pthread -lm
sanitize: sanitize-address sanitize-thread sanitize-models

sanitize-address:
	mkdir -p build
	$(DRIVER) $(SANITIZED) -o build/driver-address
	for seed in $(SEEDS); do build/driver-address stress $(STEPS) $$seed || exit 1; done

sanitize-thread:
	mkdir -p build
	$(DRIVER) -fsanitize=thread -o build/driver-thread
	for seed in $(SEEDS); do build/driver-thread stress $(STEPS) $$seed || exit 1; done

sanitize-models: $(STAMP)
	mkdir -p build
	$(CC) -std=gnu11 -O1 -g -march=native -ffp-contract=off -Wno-psabi -DSOURCE_HASH='"x"' -DBF16_WEIGHTS=0 \
		-DBF16_PRODUCTS=0 $(SANITIZED) -shared -fPIC smolcli/engine/native/kernels.c smolcli/engine/native/team.c \
		-o build/libsmol-address.so -pthread -lm
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
		LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		$(BIN)/python tests/fuzz_models.py build/libsmol-address.so $(EXAMPLES)

docs: $(STAMP)
	$(BIN)/python -m tools.reference

# The documentation as a site, in build/site.
site: docs
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,parquet,ray,report]'
	touch $@
