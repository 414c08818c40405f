# Everything a fresh machine needs: `make demo` shows it, `make test` proves it. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLANG_FORMAT ?= clang-format
# Loading BPF programs needs root.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E)
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install ## install what is missing, trace a real server on a real model, show the answers
	$(AS_ROOT) $(BIN)/llmtraced demo

install: system $(VENV)/.installed ## the program and its development tools, in .venv

# BCC and kernel headers come from the distribution. Debian and Ubuntu are served here; `llmtraced check` names the
# packages of others.
system:
	@missing=""; \
	test -e /usr/lib/python3/dist-packages/bcc/__init__.py || $(PYTHON) -c 'import bcc' 2>/dev/null || missing="$$missing python3-bpfcc"; \
	ls -d /usr/src/linux-headers-* /usr/src/kernels/* /lib/modules/$$(uname -r)/build 2>/dev/null | grep -q . || missing="$$missing linux-headers"; \
	for tool in cmake g++ openssl $(CLANG_FORMAT); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	missing=$${missing/g++/g++ make}; \
	test -n "$$missing" || exit 0; \
	echo "installing:$$missing"; \
	command -v apt-get >/dev/null || { echo "no apt-get here; install these with your package manager:$$missing" >&2; exit 1; }; \
	$(AS_ROOT) apt-get update -qq || true; \
	if [[ $$missing == *linux-headers* ]]; then \
	  missing=$${missing/linux-headers/}; \
	  $(AS_ROOT) apt-get install -y -qq linux-headers-$$(uname -r) 2>/dev/null >/dev/null || \
	  $(AS_ROOT) apt-get install -y -qq linux-headers-amd64 >/dev/null 2>&1 || \
	  $(AS_ROOT) apt-get install -y -qq linux-headers-generic >/dev/null || exit 1; \
	fi; \
	test -z "$${missing// }" || DEBIAN_FRONTEND=noninteractive $(AS_ROOT) apt-get install -y -qq $$missing >/dev/null

$(VENV)/.installed: pyproject.toml
	@echo "installing Python packages into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,plots]'
	@touch $@

# For the end-to-end tests. Unpacked and not installed: the package starts a service.
$(VENV)/.prometheus: $(VENV)/.installed
	@echo "fetching Debian's Prometheus"
	@rm -rf $(VENV)/prometheus && mkdir $(VENV)/prometheus
	@cd $(VENV)/prometheus && { apt-get download -qq prometheus >/dev/null 2>&1 || \
	  { $(AS_ROOT) apt-get update -qq; apt-get download -qq prometheus; }; } && dpkg -x prometheus_*.deb . && rm prometheus_*.deb
	@ln -sf ../prometheus/usr/bin/prometheus ../prometheus/usr/bin/promtool $(BIN)/
	@touch $@

test: lint types unit kernel e2e ## all of it

lint: install ## style, import directions, formatting of Python and BPF
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(CLANG_FORMAT) --dry-run --Werror bpf/*

types: install ## mypy, strict
	$(BIN)/mypy

unit: install ## no root, seconds
	$(BIN)/python -m pytest tests/unit -q

kernel: install ## real probes, real faults, exact counts (root)
	$(AS_ROOT) $(BIN)/python -m pytest tests/kernel -q

e2e: install $(VENV)/.prometheus ## a real llama-server with a real model (root)
	$(AS_ROOT) $(BIN)/python -m pytest tests/e2e -q

# Another kernel, its headers and virtme-ng go into the cache and .venv; QEMU is the machine's. KERNEL=linux-image-...
# takes another one that apt knows. (liburing is compiled for this processor, like the usual llama-server.) tests/guest/boot.py says what a guest is, docs/compatibility.md what came out.
KERNEL ?= linux-image-amd64
GUEST = $(AS_ROOT) $(BIN)/python tests/guest/boot.py --kernel '$(KERNEL)' --server --
GUEST_KERNEL := tests/kernel/test_pressure_real.py tests/kernel/test_prefetch_pages.py \
  'tests/kernel/test_exact.py::test_major_faults_and_adds_are_exact_ten_times_of_ten[0]' \
  tests/kernel/test_exact.py::test_causes_are_told_apart
GUEST_E2E := tests/e2e/test_record_server.py::test_the_experts_chosen_are_the_experts_touched \
  tests/e2e/test_prefetch.py::test_tokens_stay_the_same_and_reads_fall \
  tests/e2e/test_prefetch.py::test_a_kill_leaves_nothing_pinned

test-guest: install ## what depends on the kernel, under Debian's own one in QEMU (root, half an hour)
	@missing=""; \
	for tool in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static /sbin/depmod:kmod udevadm:udev; do \
	  command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	test -z "$$missing" || DEBIAN_FRONTEND=noninteractive $(AS_ROOT) apt-get install -y -qq --no-install-recommends $$missing >/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[guest]'
	$(GUEST) llmtraced check
	$(GUEST) pytest -q -k 'not uring' $(GUEST_KERNEL)
	$(GUEST) pytest -q $(GUEST_E2E)

fmt: install ## format Python and BPF sources
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(CLANG_FORMAT) -i bpf/*

bench: install ## measure this tool on this machine
	$(AS_ROOT) $(BIN)/llmtraced bench events
	$(AS_ROOT) $(BIN)/llmtraced bench overhead

clean: ## remove what was built here (not the cache in ~/.cache/llmtraced)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.PHONY: help demo install system test lint types unit kernel e2e test-guest fmt bench clean
