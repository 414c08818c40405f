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

demo: venv ## install what is missing, trace a real server on a real model, show the answers
	$(AS_ROOT) $(BIN)/llmtraced demo

venv: system $(VENV)/.installed ## the program and its development tools, in .venv

# BCC and kernel headers come from the distribution. Debian and Ubuntu are served here; `llmtraced check` names the
# packages of others.
system:
	@missing=""; \
	test -e /usr/lib/python3/dist-packages/bcc/__init__.py || $(PYTHON) -c 'import bcc' 2>/dev/null || missing="$$missing python3-bpfcc"; \
	ls -d /usr/src/linux-headers-* /usr/src/kernels/* /lib/modules/$$(uname -r)/build 2>/dev/null | grep -q . || missing="$$missing linux-headers"; \
	for tool in cmake g++ openssl $(CLANG_FORMAT); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	test -x /lib/systemd/systemd || missing="$$missing systemd"; \
	command -v ip >/dev/null || missing="$$missing iproute2"; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	PATH=$$PATH:/usr/sbin:/sbin command -v mkfs.ext4 >/dev/null || missing="$$missing e2fsprogs"; \
	PATH=$$PATH:/usr/sbin:/sbin command -v mkfs.xfs >/dev/null || missing="$$missing xfsprogs"; \
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

lint: venv ## style, import directions, formatting of Python and BPF
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(CLANG_FORMAT) --dry-run --Werror bpf/*

types: venv ## mypy, strict
	$(BIN)/mypy

unit: venv ## no root, seconds
	$(BIN)/python -m pytest tests/unit -q

kernel: venv ## real probes, real faults, exact counts (root)
	$(AS_ROOT) $(BIN)/python -m pytest tests/kernel -q

e2e: venv $(VENV)/.prometheus ## a real llama-server with a real model (root)
	$(AS_ROOT) $(BIN)/python -m pytest tests/e2e tests/matrix -q

CASES ?= 5000000
fuzz: venv ## mutated GGUF files by the million, with a random seed (CASES=5000000)
	$(BIN)/python tests/fuzz.py $(CASES)

MINUTES ?= 10
soak: venv ## nothing grows with time (MINUTES=10; root)
	LLMTRACED_SOAK=$$(($(MINUTES) * 60)) $(AS_ROOT) $(BIN)/python -m pytest tests/e2e/test_soak.py -q -s

KILLS ?= 100
kills: venv ## kill -9 of daemon and server at random moments, so many each (KILLS=100; root)
	LLMTRACED_KILLS=$(KILLS) $(AS_ROOT) $(BIN)/python -m pytest tests/e2e/test_kills.py -q -s

# Another kernel, its headers and virtme-ng go into the cache and .venv; QEMU is the machine's. KERNEL=linux-image-...
# takes another one that apt knows. (The usual llama-server is compiled for this processor.) tests/guest/boot.py says what a guest is, docs/compatibility.md what came out.
KERNEL ?= linux-image-amd64
BOOT = $(AS_ROOT) $(BIN)/python tests/guest/boot.py --kernel '$(KERNEL)' --server
GUEST = $(BOOT) --
GUEST_KERNEL := tests/kernel/test_pressure_real.py tests/kernel/test_prefetch_pages.py \
  'tests/kernel/test_exact.py::test_major_faults_and_adds_are_exact_ten_times_of_ten[0]' \
  tests/kernel/test_exact.py::test_causes_are_told_apart
GUEST_E2E := tests/e2e/test_record_server.py::test_the_experts_chosen_are_the_experts_touched \
  tests/e2e/test_prefetch.py::test_tokens_stay_the_same_and_reads_fall \
  tests/e2e/test_prefetch.py::test_a_kill_leaves_nothing_pinned

test-guest: venv ## what depends on the kernel, under Debian's own one in QEMU (root, half an hour)
	@missing=""; \
	for tool in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static /sbin/depmod:kmod udevadm:udev; do \
	  command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	test -z "$$missing" || DEBIAN_FRONTEND=noninteractive $(AS_ROOT) apt-get install -y -qq --no-install-recommends $$missing >/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[guest]'
	$(GUEST) llmtraced check
	$(GUEST) pytest -q -k 'not uring' $(GUEST_KERNEL)
	$(GUEST) pytest -q $(GUEST_E2E)
	$(BOOT) --copy -- pytest -q -s tests/guest/test_time.py

# Each build is compiled once (5 to 8 minutes on 2 cores) or downloaded, into ~/.cache/llmtraced/builds, where the table
# of results is too. BUILDS=server-9093,python-8233 takes some of them; tests/matrix/builds.py has the list.
BUILDS ?= all
test-matrix: venv ## other builds of llama.cpp, each cell of the table in docs/compatibility.md (root, an hour and a half at first)
	LLMTRACED_E2E=1 LLMTRACED_MATRIX=$(BUILDS) $(AS_ROOT) $(BIN)/python -m pytest tests/matrix -q
	@cat "$${LLMTRACED_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/llmtraced}/builds/matrix.md"

fmt: venv ## format Python and BPF sources
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(CLANG_FORMAT) -i bpf/*

PREFIX ?= /usr/local
DESTDIR ?=
INTO = $(DESTDIR)$(PREFIX)
PROGRAM = $(INTO)/lib/llmtraced
MAKER ?= $(PROGRAM)/bin/python
HERE = test -n "$(DESTDIR)" || ! test -d /run/systemd/system ||

install: install-program install-files ## for good: program, units, manual, completion; PREFIX=/usr/local, DESTDIR=
	@test -n "$(DESTDIR)" || systemd-sysusers "$(PREFIX)/lib/sysusers.d/llmtraced.conf"
	@$(HERE) systemctl daemon-reload
	@echo "installed; systemctl enable --now llmtraced starts the daemon"
	@test -n "$(DESTDIR)" || test "$$(cat /proc/sys/kernel/perf_event_paranoid 2>/dev/null || echo 0)" -le 2 || \
	  echo "but kernel.perf_event_paranoid is above 2: some kernels (Debian's) then refuse what it needs, see docs/systemd.md"

install-program:
	@$(PYTHON) -c 'import sys; sys.exit(sys.base_prefix.startswith(("/root/", "/home/")))' || \
	  { echo "$(PYTHON) is in somebody's home, which services do not see; make install PYTHON=/usr/bin/python3" >&2; exit 1; }
	$(PYTHON) -m venv "$(PROGRAM)"
	"$(PROGRAM)/bin/python" -m pip install --quiet --disable-pip-version-check '.[plots]'
	@test -z "$(DESTDIR)" || sed -i 's|$(PROGRAM)|$(PREFIX)/lib/llmtraced|g' $$(grep -lI '$(PROGRAM)' "$(PROGRAM)"/bin/* "$(PROGRAM)/pyvenv.cfg")

install-files:
	install -d "$(INTO)/bin" "$(INTO)/lib/systemd/system" "$(INTO)/lib/sysusers.d" "$(INTO)/share/man/man1" \
	  "$(INTO)/share/bash-completion/completions" "$(INTO)/share/zsh/site-functions" "$(DESTDIR)/etc"
	ln -sf ../lib/llmtraced/bin/llmtraced "$(INTO)/bin/llmtraced"
	for unit in llmtraced.service llmtraced-prefetch@.service; do \
	  sed 's|/usr/local|$(PREFIX)|g' "systemd/$$unit" > "$(INTO)/lib/systemd/system/$$unit" || exit 1; done
	install -m 644 systemd/llmtraced.sysusers "$(INTO)/lib/sysusers.d/llmtraced.conf"
	test -e "$(DESTDIR)/etc/llmtraced.toml" || install -m 644 systemd/llmtraced.toml "$(DESTDIR)/etc/llmtraced.toml"
	"$(MAKER)" -m llmtraced.commands._manual man > "$(INTO)/share/man/man1/llmtraced.1"
	"$(MAKER)" -m llmtraced.commands._manual bash > "$(INTO)/share/bash-completion/completions/llmtraced"
	"$(MAKER)" -m llmtraced.commands._manual zsh > "$(INTO)/share/zsh/site-functions/_llmtraced"

uninstall: ## what make install put there; /etc/llmtraced.toml, traces and the user llmtraced stay
	@$(HERE) systemctl disable --now llmtraced 'llmtraced-prefetch@*' || true
	@$(HERE) systemctl clean --what=cache llmtraced || true
	rm -rf "$(PROGRAM)"
	rm -f "$(INTO)/bin/llmtraced" "$(INTO)/lib/systemd/system/llmtraced.service" \
	  "$(INTO)/lib/systemd/system/llmtraced-prefetch@.service" "$(INTO)/lib/sysusers.d/llmtraced.conf" \
	  "$(INTO)/share/man/man1/llmtraced.1" "$(INTO)/share/bash-completion/completions/llmtraced" \
	  "$(INTO)/share/zsh/site-functions/_llmtraced"
	@$(HERE) systemctl daemon-reload

bench: venv ## measure this tool on this machine
	$(AS_ROOT) $(BIN)/llmtraced bench events
	$(AS_ROOT) $(BIN)/llmtraced bench overhead
	$(AS_ROOT) $(BIN)/llmtraced bench scrape

clean: ## remove what was built here (not the cache in ~/.cache/llmtraced)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.PHONY: help demo venv install install-program install-files uninstall system test lint types unit kernel e2e fuzz soak kills test-guest test-matrix fmt bench clean
