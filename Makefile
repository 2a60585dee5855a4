# Footlight. `make help` lists what there is. Everything here may be run again at any time: what is done is not done twice.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

ARCH := $(shell uname -m)
BPF_ARCH := $(patsubst aarch64,arm64,$(patsubst x86_64,x86,$(ARCH)))
DEB_ARCH := $(patsubst aarch64,arm64,$(patsubst x86_64,amd64,$(ARCH)))
CLANG ?= clang
LLVM_STRIP ?= llvm-strip
BPF_FLAGS := -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -Ibpf
BPF_CFLAGS := $(BPF_FLAGS) -D__TARGET_ARCH_$(BPF_ARCH) -I/usr/include/$(ARCH)-linux-gnu
# The other machine that the probes are for: what is compiled for it is thrown away.
OTHER_ARCH := $(if $(filter aarch64,$(ARCH)),x86_64,aarch64)
OTHER_CFLAGS := $(BPF_FLAGS) -D__TARGET_ARCH_$(if $(filter aarch64,$(ARCH)),x86,arm64) -I/usr/$(OTHER_ARCH)-linux-gnu/include
BPF_OBJECTS := $(patsubst bpf/%.bpf.c,probes/objects/%.bpf.o,$(wildcard bpf/*.bpf.c))
BPF_HEADERS := $(wildcard bpf/*.h)
NATIVE := examples/roleplay/native/libllm_kv.so
OTHER_BPF = $(shell find tests benchmarks -name '*.bpf.c' 2>/dev/null)
C_FILES = $(shell find bpf examples tests benchmarks '(' -name '*.c' -o -name '*.h' ')' -not -path '*/node_modules/*' 2>/dev/null)

# Debian packages, each with the command or file that shows that it is there.
BUILD_NEEDS := clang:clang llvm:llvm-strip libbpf-dev:/usr/include/bpf/bpf_helpers.h libbpf1:/usr/lib/$(ARCH)-linux-gnu/libbpf.so.1 \
	python3-venv:/var/lib/dpkg/info/python3-venv.list libc6-dev:/usr/include/stdio.h systemtap-sdt-dev:/usr/include/$(ARCH)-linux-gnu/sys/sdt.h
CHECK_NEEDS := $(BUILD_NEEDS) clang-format:clang-format \
	linux-libc-dev-$(if $(filter aarch64,$(ARCH)),amd64,arm64)-cross:/usr/$(OTHER_ARCH)-linux-gnu/include/asm/ptrace.h
TEST_NEEDS := $(BUILD_NEEDS) prometheus:promtool nodejs:node npm:npm bpftrace:bpftrace libbpf-tools:/usr/sbin/runqlat \
	chromium:chromium prometheus-alertmanager:amtool openssl:openssl systemd:/usr/bin/systemd-analyze
BENCH_NEEDS := $(BUILD_NEEDS) gcc:gcc bpftool:/usr/sbin/bpftool \
	python3-bpfcc:/usr/lib/python3/dist-packages/bcc/__init__.py linux-headers-$(DEB_ARCH):/var/lib/dpkg/info/linux-headers-$(DEB_ARCH).list \
	iproute2:/usr/sbin/tc e2fsprogs:/usr/sbin/mkfs.ext4 mount:/usr/sbin/losetup util-linux:taskset \
	prometheus:promtool prometheus-alertmanager:amtool

# Installs what of $(1) is missing, without starting any service that comes with it.
define install
	@missing=; for need in $(1); do \
		package=$${need%%:*}; sign=$${need#*:}; \
		case $$sign in /*) [ -e $$sign ] ;; *) command -v $$sign >/dev/null ;; esac || missing="$$missing $$package"; \
	done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "error: these Debian packages are missing:$$missing" >&2; \
		echo "  try: sudo apt-get install --no-install-recommends$$missing" >&2; exit 1; \
	fi; \
	echo "installing$$missing"; \
	if [ ! -e /usr/sbin/policy-rc.d ]; then \
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
		printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	log=$$(mktemp); \
	{ apt-get -q update && apt-get -q install -y --no-install-recommends $$missing; } >$$log 2>&1 </dev/null \
		|| { tail -n 20 $$log >&2; echo "error: apt-get could not install$$missing" >&2; echo "  try: apt-get update, then the same again" >&2; exit 1; }; \
	rm -f $$log
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: need-build $(VENV)/.footlight-demo bpf native ## the demo: a role-play service, its users and the live table (root; installs what it needs)
	@$(VENV)/bin/footlight demo

.PHONY: test
test: need-test $(VENV)/.footlight-dev bpf native ## all tests: unit, kernel, e2e (root; installs what it needs; CI=true makes a skip a failure)
	@$(PY) -m pytest tests/unit tests/kernel tests/e2e $(ARGS)

.PHONY: check
check: need-check $(VENV)/.footlight-dev bpf ## ruff, mypy --strict, clang-format, C warnings as errors (for arm64, too), generated pages fresh
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy --strict probes exporter dashboards
	@clang-format --dry-run -Werror $(C_FILES)
	@set -e; for source in $(OTHER_BPF); do $(CLANG) $(BPF_CFLAGS) -I$$(dirname $$source) -fsyntax-only $$source; done
	@set -e; for source in $(wildcard bpf/*.bpf.c); do $(CLANG) $(OTHER_CFLAGS) -c $$source -o /dev/null; done
	@$(PY) -m exporter.metrics_doc --check
	@$(PY) -m dashboards.build --check
	@echo "all checks passed"

.PHONY: bench
bench: need-bench $(VENV)/.footlight-dev bpf native ## every benchmark: reader, truth, overhead, paths, scale, faults, quota, cuda, alerts, health, dashboards (root; over an hour)
	@failed=; \
	try() { echo; echo "== $$1: $${*:2}"; "$${@:2}" || failed="$$failed $$1"; }; \
	for name in reader truth overhead paths scale faults quota cuda alerts health; do \
		try $$name $(PY) -m benchmarks.$$name; \
	done; \
	try dashboards env DASHBOARDS_WATCHED_S=120 $(PY) -m pytest -q -s tests/e2e/test_dashboards.py; \
	[ -z "$$failed" ] || { echo; echo "missed a bar, or failed:$$failed" >&2; exit 1; }

.PHONY: docs
docs: need-build $(VENV)/.footlight-dev bpf ## write what is generated: docs/metrics.md, exporter/slo/metrics.json, dashboards/*.json
	@$(PY) -m exporter.metrics_doc
	@$(PY) -m exporter.slo.catalogue
	@$(PY) -m dashboards.build

.PHONY: bpf
bpf: $(BPF_OBJECTS) probes/objects/syscalls.txt ## compile bpf/*.bpf.c into probes/objects/

probes/objects/%.bpf.o: bpf/%.bpf.c $(BPF_HEADERS) Makefile
	@mkdir -p $(@D)
	$(CLANG) $(BPF_CFLAGS) -c $< -o $@
	@$(LLVM_STRIP) -g $@

# The names of the system calls, by number, as this architecture's headers have them.
probes/objects/syscalls.txt: Makefile | need-build
	@mkdir -p $(@D)
	@echo '#include <asm/unistd.h>' | $(CLANG) -E -dD -x c -I/usr/include/$(ARCH)-linux-gnu - \
		| awk '$$1 == "#define" && $$2 ~ /^__NR(3264)?_/ && $$3 ~ /^[0-9]+$$/ { sub(/^__NR(3264)?_/, "", $$2); print $$3, $$2 }' \
		| sort -nu > $@

.PHONY: native
native: $(NATIVE) ## compile the role-play engine's library, on whose calls a probe point can be put

# With a frame pointer a function begins with a push. The kernel emulates that; over most others it has to step, at a price.
$(NATIVE): examples/roleplay/native/kv_lookup.c Makefile
	$(CLANG) -O2 -g -fPIC -fno-omit-frame-pointer -shared -Wall -Wextra -Werror $< -o $@

.PHONY: format
format: $(VENV)/.footlight-dev ## let ruff and clang-format mend what they can
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@clang-format -i $(C_FILES)

.PHONY: clean
clean: ## remove what was built; the virtual environment too
	@rm -rf probes/objects/*.bpf.o probes/objects/syscalls.txt $(NATIVE) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What each target needs from the distribution.
.PHONY: need-build need-check need-test need-bench
need-build:
	$(call install,$(BUILD_NEEDS))
need-check:
	$(call install,$(CHECK_NEEDS))
need-test:
	$(call install,$(TEST_NEEDS))
need-bench:
	$(call install,$(BENCH_NEEDS))

# Order-only: a missing package must be there before, but being asked about it does not make these stale.
$(BPF_OBJECTS) $(NATIVE): | need-build
$(VENV)/.footlight-%: pyproject.toml setup.py | need-build
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@echo "installing footlight[$*] into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
