# Everything a person does with this tree. As root on Debian 12: `make demo`, `make test`.

PYTHON := /usr/bin/python3
export PATH := /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PYTHONDONTWRITEBYTECODE := 1
# The machine's own Python settings are not part of the test.
unexport PYTHONPATH PYTHONHOME PYENV_ROOT PYENV_VERSION VIRTUAL_ENV

PYTEST := $(PYTHON) -m pytest --durations=10 -ra

# Guests under emulation take minutes: they belong to lab-full.
LAB := tests/lab --ignore=tests/lab/qemu

# Programs of others that runs use in lab-full.
CLIENTS := build/clients

.PHONY: build deb test test-unit test-host test-lab lab-full demo lint bench fuzz deps full-deps inspect clean

build: deps
	$(MAKE) --no-print-directory -C probes all

deps:
	@packaging/install-packages packaging/packages.txt

# mitmproxy and what it needs, for each Debian release's Python: what agent-assembly-inspect carries.
INSPECT := build/inspect
LAY_IN := packaging/inspect/lay-in
inspect: $(INSPECT)/py311 $(INSPECT)/py313

$(INSPECT)/py311: packaging/inspect/requirements-py311.txt $(LAY_IN) | deps
	$(LAY_IN) $@ 3.11 $<
	@touch $@

$(INSPECT)/py313: packaging/inspect/requirements-py313.txt $(LAY_IN) | deps
	$(LAY_IN) $@ 3.13 $<
	@touch $@

# The stock program, which benchmarks measure beside ours.
$(INSPECT)/mitmdump: packaging/inspect/requirements-py311.txt packaging/inspect/requirements-mitmdump.txt $(LAY_IN) | deps
	KEEP=1 $(LAY_IN) $@ 3.11 $(filter %.txt,$^)
	@touch $@

# The packages, in dist/. Built in copies, so the tree stays as it is. The engines' are built again
# only when something of theirs changed.
deb: build $(INSPECT)/deb12 $(INSPECT)/deb13
	packaging/build-deb dist
	@cp $(INSPECT)/deb12/*.deb $(INSPECT)/deb13/*.deb dist/
	@ls dist/agent-assembly-inspect_*.deb

INSPECT_DEB := packaging/inspect/build-deb packaging/inspect/licences packaging/deb/changelog \
	$(wildcard packaging/inspect/deb/*)
$(INSPECT)/deb12: $(INSPECT)/py311 $(INSPECT_DEB) | deps
	packaging/inspect/build-deb $< deb12 3.11 3.12 $@
	@touch $@

$(INSPECT)/deb13: $(INSPECT)/py313 $(INSPECT_DEB) | deps
	packaging/inspect/build-deb $< deb13 3.13 3.14 $@
	@touch $@

test: build deb
	$(PYTEST) tests/unit tests/host $(LAB)

test-unit: deps
	$(PYTEST) tests/unit

test-host: build
	$(PYTEST) tests/host

test-lab: deb
	$(PYTEST) $(LAB)

# What takes longer: whole guests with Debian's own kernels, and clients that have to be got or built.
lab-full: deb full-deps $(CLIENTS)/go $(CLIENTS)/pypi
	$(PYTEST) tests/full tests/lab/qemu
	$(MAKE) --no-print-directory fuzz

full-deps:
	@packaging/install-packages packaging/packages-full.txt
	@command -v npm > /dev/null || packaging/install-packages packaging/packages-npm.txt

$(CLIENTS)/go: tests/full/clients/fetch.go | full-deps
	@mkdir -p $(@D)
	CGO_ENABLED=0 GO111MODULE=off GOPROXY=off GOCACHE=$(abspath build/go) /usr/bin/go build -o $@ $<

$(CLIENTS)/pypi: packaging/requirements-clients.txt | deps
	$(PYTHON) -m venv $(@D)/pip
	$(@D)/pip/bin/pip install --quiet --only-binary=:all: --upgrade --target $@ --requirement $<
	@touch $@

demo: deb
	$(PYTHON) -m tests.lab.demo

# ruff is not in Debian 12: both checkers come from the Python index, into build/.
LINT := build/lint
$(LINT)/bin/ruff: packaging/requirements-lint.txt | deps
	$(PYTHON) -m venv --system-site-packages $(LINT)
	$(LINT)/bin/pip install --quiet --requirement packaging/requirements-lint.txt

lint: $(LINT)/bin/ruff
	$(LINT)/bin/ruff check --no-cache aa tests benchmarks docs
	$(LINT)/bin/ruff format --no-cache --check --quiet aa tests benchmarks docs
	$(LINT)/bin/mypy --cache-dir build/mypy

# Coverage-guided, for some seconds each; the seconds and targets can be given: FUZZ_TARGETS="sniff".
FUZZ := build/fuzz
FUZZ_SECONDS ?= 20
FUZZ_TARGETS ?=
$(FUZZ)/bin/pip: packaging/requirements-fuzz.txt | deps
	$(PYTHON) -m venv --system-site-packages $(FUZZ)
	$(FUZZ)/bin/pip install --quiet --disable-pip-version-check --requirement packaging/requirements-fuzz.txt
	@touch $@

fuzz: $(FUZZ)/bin/pip $(INSPECT)/py311
	$(FUZZ)/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

# The policy engines that ours is measured beside.
BENCH := build/bench
$(BENCH)/bin/pip: packaging/requirements-bench.txt | deps
	$(PYTHON) -m venv --system-site-packages $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --requirement packaging/requirements-bench.txt
	@touch $@

bench: deb $(BENCH)/bin/pip
	$(PYTHON) -m benchmarks

clean:
	rm -rf build dist probes/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
