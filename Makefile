# One command each; a bare `make` lists them. Every target does its own set-up first.
#
# Variables: PYTHON (interpreter for .venv), ARGS (further arguments for demo, bench, and the tests),
# HUGEPAGES (2 MiB pages reserved, when root, while tests or a demo with --backing hugetlb run),
# INTEROP_HUGEPAGES (more of them for test-interop: two QEMUs with 4 GiB; without room, those cases are skipped),
# N and SEED (how many chaos runs, and the first one's seed; none: a new one every time).

PYTHON ?= python3
HUGEPAGES ?= 64
INTEROP_HUGEPAGES ?= 4096
ARGS ?=
FUZZ_SECONDS ?= 60
N ?= 100
SEED ?=

VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest
NATIVE := $(shell find uffd guestmem migration \( -name '*.c' -o -name '*.h' -o -name '*.S' \
	-o -name '_build.py' \) ! -name '_native.c' 2>/dev/null)

MATRIX_TESTS = $(sort $(wildcard tests/kernel/test_uffd_*.py))

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-scale test-numa test-tracer test-quick check bench sanitize test-kernel test-e2e test-interop fuzz chaos \
	docs qemu-10 qemu-script guest-linux kernel-matrix kernel-matrix-short vagrant-test vagrant-demo lock clean \
	system-build system-fuzz system-kernels system-vagrant system-test

help: ## this list
	@echo "usage: make TARGET [ARGS='...']"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1@\2/p' $(MAKEFILE_LIST) | \
		awk -F@ '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(VENV)/.built ## .venv from the lock file, the C parts in place; as root also missing Debian packages

demo: $(VENV)/.built ## migrate a toy VM live between two processes of this machine
	@$(if $(findstring hugetlb,$(ARGS)),scripts/with-hugepages $(HUGEPAGES)) $(BIN)/postcopy demo $(ARGS)

test: system-test qemu-script guest-linux $(VENV)/.built ## everything this host can prove
	@scripts/with-hugepages $(HUGEPAGES) $(PYTEST) $(ARGS)

test-quick: $(VENV)/.built ## unit and property tests, half a minute
	@HYPOTHESIS_PROFILE=quick $(PYTEST) -q tests/unit tests/property $(ARGS)

check: $(VENV)/.deps ## ruff, mypy --strict, import arrows; under a minute
	@failed=; \
	$(BIN)/ruff check -q --output-format concise || failed="$$failed ruff-check"; \
	$(BIN)/ruff format -q --check --output-format concise || failed="$$failed ruff-format"; \
	$(BIN)/mypy || failed="$$failed mypy"; \
	$(PYTEST) -q --no-header -p no:cacheprovider tests/unit/test_imports.py || failed="$$failed imports"; \
	[ -z "$$failed" ] || { echo "check failed:$$failed" >&2; exit 1; }

test-scale: system-test $(VENV)/.built ## sparse guests of 1 TiB and 10,000 blocks; figures: postcopy bench --scale
	@POSTCOPY_SCALE_GIB=1024 $(PYTEST) tests/e2e/test_sparse.py tests/e2e/test_many_blocks.py $(ARGS)

test-numa: system-test $(VENV)/.built ## NUMA policies and placement, in an emulated VM with two nodes (minutes)
	@scripts/kernel-matrix --kernels 6.12 --nodes 2 --no-validate --fresh --results build/numa \
		--tests tests/kernel/test_guestmem_numa_nodes.py $(ARGS)

bench: $(VENV)/.built ## fault latency, throughput and downtime beside the machine's own limits
	@$(BIN)/postcopy bench $(ARGS)

test-tracer: system-test $(VENV)/.built ## kill the tracer of `postcopy inspect` after each of its requests; twenty minutes
	@POSTCOPY_TRACER=full scripts/with-hugepages $(HUGEPAGES) $(PYTEST) -q tests/kernel/test_tracee.py \
		tests/e2e/test_inspect_redis.py $(ARGS)

sanitize: $(VENV)/.built ## C core under address, undefined-behaviour and thread sanitizers
	@scripts/with-hugepages $(HUGEPAGES) $(BIN)/python -m tests.native.run_drivers $(ARGS)

test-kernel: system-test $(VENV)/.built ## only the tests of kernel interfaces
	@scripts/with-hugepages $(HUGEPAGES) $(PYTEST) -m kernel $(ARGS)

test-e2e: system-test qemu-script $(VENV)/.built ## only whole processes end to end
	@scripts/with-hugepages $(HUGEPAGES) $(PYTEST) tests/e2e $(ARGS)

test-interop: system-test guest-linux $(VENV)/.built ## with a stock QEMU as peer: every combination, about two hours
	@POSTCOPY_INTEROP=full scripts/with-hugepages $(HUGEPAGES) scripts/with-hugepages $(INTEROP_HUGEPAGES) $(PYTEST) tests/interop $(ARGS)

chaos: system-test $(VENV)/.built ## N migrations with random faults over shaped networks, from SEED on; two seconds each
	@$(BIN)/python -m tests.chaos --count $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: system-fuzz $(VENV)/.built ## libFuzzer and atheris, FUZZ_SECONDS a target; then property tests with many more examples
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements/fuzz.txt || \
		echo "fuzz: no atheris for this Python; its target is left out" >&2
	@$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)
	@HYPOTHESIS_PROFILE=fuzz $(PYTEST) -q --timeout 3600 tests/property $(ARGS)

docs: $(VENV)/.deps ## redraw docs/states.md from the engine's tables
	@PYTHONPATH=. $(BIN)/python docs/draw_states.py

qemu-10: ## unpack a newer QEMU beside the installed one, as a second peer for test-interop
	@scripts/fetch-qemu

guest-linux: # a Debian kernel as a guest for the interop tests
	@scripts/fetch-linux >/dev/null || echo "no mirror of Debian's kernels here; the tests with a Linux guest are skipped" >&2

qemu-script: # QEMU's own analysis script, for the test that compares ours with it
	@scripts/fetch-qemu-script || echo "no mirror of QEMU's source here; one test is skipped" >&2

kernel-matrix: system-kernels $(VENV)/.built ## validate Debian's 5.10 to 7.3, each in an emulated VM; rewrites docs/kernel-matrix.md
	@scripts/kernel-matrix --markdown docs/kernel-matrix.md $(MATRIX_TESTS:%=--tests %) $(ARGS)

kernel-matrix-short: system-kernels $(VENV)/.built ## the oldest and the newest kernel, a few cases, migrations between them; minutes
	@scripts/kernel-matrix --kernels 5.10,7.3 --short $(ARGS)

vagrant-test: system-vagrant $(VENV)/.built ## two Vagrant hosts, tests/hosts over ssh, everything down again; as root
	@REQUIRE_KERNEL=1 scripts/vagrant-hosts $(BIN)/python -m pytest tests/hosts $(ARGS)

vagrant-demo: system-vagrant $(VENV)/.built ## a guest moves between two Vagrant hosts, both consoles side by side; as root
	@scripts/vagrant-hosts $(BIN)/python -m tests.hosts.demo $(ARGS)

lock: ## renew requirements/dev.lock from pyproject.toml
	@scripts/relock

clean: ## remove everything the other targets made
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find uffd guestmem migration tests scripts -name __pycache__ -prune -exec rm -rf {} +
	find uffd guestmem migration \( -name '*.so' -o -name '*.o' -o -name '_native.c' \) -exec rm -f {} +

system-build:
	@PYTHON=$(PYTHON) scripts/setup-debian build

system-fuzz:
	@PYTHON=$(PYTHON) scripts/setup-debian fuzz

system-kernels:
	@PYTHON=$(PYTHON) scripts/setup-debian kernels

system-vagrant:
	@PYTHON=$(PYTHON) scripts/setup-debian vagrant

system-test:
	@PYTHON=$(PYTHON) scripts/setup-debian test

# The two stamps: packages from the lock file, then our own package with its C parts. Order-only on
# the system step, which looks every time but changes nothing that would need a rebuild. What a
# _build.py run by hand left behind would be imported instead of what is built here: it goes.
$(VENV)/.deps: requirements/dev.lock | system-build
	@echo "setting up $(VENV) (once; needs the network)"
	@$(BIN)/python -c pass 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements/dev.lock
	@touch $@

$(VENV)/.built: $(VENV)/.deps pyproject.toml setup.py $(NATIVE)
	@echo "building the C parts"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@find uffd guestmem migration -name '_native.cpython-*.so' -exec rm -f {} +
	@touch $@
