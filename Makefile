# Works with GNU make 3.81 (macOS). Every target sets itself up: nothing has to be installed but Python 3.11 or newer.

SHELL = /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup run test check bench soak faults contract reset
.DELETE_ON_ERROR:

PY := .venv/bin/python
STAMP := .venv/.ready
CONFIG := examples/three-facilities.toml
# Three processes, mostly waiting for real ones; whole files each: the tests of a file share a deployment
ALL_TESTS := -n 3 --dist loadfile --no-loadscope-reorder
# MiB for the environment, the locked artifacts and the first data
DISK := 1500

ONCE ?=
REPORT ?=
EVENTS ?=
ARGS ?=

# pip of older Pythons does not know SSL_CERT_FILE
ifeq ($(PIP_CERT)$(REQUESTS_CA_BUNDLE),)
ifneq ($(SSL_CERT_FILE),)
export PIP_CERT := $(SSL_CERT_FILE)
endif
endif

# Shows pip as one line that counts; the whole output goes to the log. Its last line is pip's exit code.
define COUNT_PACKAGES
import re, sys
total, log = int(sys.argv[1]), open(sys.argv[2], "w")
live, seen, code = sys.stdout.isatty(), 0, 1
for line in sys.stdin:
    if line.startswith("exit code "):
        code = int(line.split()[2])
        continue
    log.write(line)
    if re.match("Collecting |Requirement already satisfied", line):
        seen += 1
        if live or seen % 25 == 0:
            print("  package %d of %d" % (min(seen, total), total), end="\r" if live else "\n", flush=True)
    elif line.startswith("Installing collected"):
        print("  installing %d packages      " % total, flush=True)
log.close()
sys.exit(code)
endef
export COUNT_PACKAGES

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make run ONCE=1 REPORT=report.json EVENTS=2000   ends when all is settled, and writes the report"
	@echo "  make test ARGS='tests/unit -k money'             runs a part"

run: $(STAMP) ## Start everything and show it live (ONCE=1, REPORT=file, EVENTS=number)
	@.venv/bin/remitstream run --config $(CONFIG) \
	  $(if $(filter-out 0,$(ONCE)),--once) $(if $(REPORT),--report $(REPORT)) $(if $(EVENTS),--events $(EVENTS))

test: $(STAMP) ## Run all tests: unit, conformance, integration on the real stack (ARGS=...)
	@$(if $(ARGS),,INVARIANTS_FILE=docs/generated/invariants.json) $(PY) -m pytest $(or $(ARGS),$(ALL_TESTS))

check: $(STAMP) ## Check format, lint, types, import rules and generated documents
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@.venv/bin/remitstream tables --check

bench: $(STAMP) ## Measure worker and deliverer beside other libraries; says first how many minutes it takes (ARGS=...)
	@$(if $(ARGS),,echo "about 30 minutes: the worker 21, the deliverer 9")
	@$(PY) -m bench $(ARGS)
	@$(if $(ARGS),,$(PY) -m bench.posting)

soak: $(STAMP) ## Does the worker's memory stay flat: 20 minutes at a steady rate, then every event is checked (ARGS=...)
	@$(PY) -m bench.soak $(ARGS)

faults: $(STAMP) ## Kill, freeze and rob workers and deliverer under a steady stream, die at every point of a batch: 65 minutes (ARGS=...)
	@$(if $(ARGS),,echo "about 65 minutes: workers under faults 20, 200 kills of the deliverer 20, every point of a batch 20, the deliverer in virtual time 5")
	@$(PY) -m tests.faults $(ARGS)
	@$(if $(ARGS),,$(PY) -m tests.faults --kills 200)
	@$(if $(ARGS),,$(PY) -m tests.crash_points --all)
	@$(if $(ARGS),,$(PY) -m tests.delivery_faults --long)

contract: $(STAMP) ## Send the targets' requests to Prism over the vendors' documents (needs node, npm and the documents)
	@$(PY) -m tests.contract

reset: ## Stop the embedded stack and remove all data of it (the download cache stays)
	@if [ -x $(PY) ] && [ -d .remitstream/stack ]; then \
	  $(PY) -c 'from pathlib import Path; from runtime.stack import EmbeddedStack; EmbeddedStack(Path(".remitstream/stack"), Path(".remitstream/stack")).reset()'; \
	fi
	@rm -rf .remitstream
	@echo "All data is removed."

setup: $(STAMP) ## Create the environment .venv from the lock (the other targets do it by themselves)

$(STAMP): requirements.lock pyproject.toml
	@case "$$(uname -s)/$$(uname -m)" in \
	  Linux/x86_64|Darwin/*) ;; \
	  *) echo "remitstream runs on Linux x86-64 and macOS, not on $$(uname -s) $$(uname -m): use such a machine, or a virtual one." >&2; exit 1 ;; \
	esac
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1024)}'); \
	if [ "$$free" -lt $(DISK) ]; then \
	  echo "$(DISK) MiB of free disk space are needed here and only $$free MiB are left: free some, then run make again." >&2; exit 1; \
	fi
	@found=; bare=; \
	for name in python3.13 python3.12 python3.11 python3; do \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  if "$$name" -c 'import ensurepip, venv' 2>/dev/null; then found=$$name; break; fi; \
	  bare=$$name; \
	done; \
	if [ -z "$$found" ] && [ -n "$$bare" ]; then \
	  echo "$$bare has no venv module: install it (Debian, Ubuntu: apt install $$bare-venv), then run make again." >&2; exit 1; \
	fi; \
	if [ -z "$$found" ]; then \
	  echo "No Python 3.11 or newer was found: install Python 3.11, 3.12 or 3.13, then run make again." >&2; exit 1; \
	fi; \
	if [ -x $(PY) ] && $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Updating .venv from requirements.lock"; \
	else \
	  echo "Creating .venv with $$("$$found" --version)"; \
	  rm -rf .venv && "$$found" -m venv .venv || { \
	    echo "The environment .venv could not be created: see the message above for the reason, then run make again." >&2; exit 1; }; \
	fi
	@{ $(PY) -m pip install --disable-pip-version-check --no-input --progress-bar off --require-hashes -r requirements.lock 2>&1; \
	   echo "exit code $$?"; } | $(PY) -c "$$COUNT_PACKAGES" $$(grep -c '==' requirements.lock) .venv/setup.log || { \
	  if grep -q -i 'no space left' .venv/setup.log; then \
	    echo "The disk is full: free at least $(DISK) MiB, then run make again (it goes on where it was)." >&2; \
	  elif grep -q -i -E 'connection|resolution|timed out|ssl|proxy|max retries|from versions: none' .venv/setup.log; then \
	    echo "The package index cannot be reached: check the network, behind a proxy set HTTPS_PROXY and SSL_CERT_FILE, then run make again." >&2; \
	  else \
	    tail -n 5 .venv/setup.log >&2; \
	    echo "Installing the locked packages failed: the reason is above and in .venv/setup.log." >&2; \
	  fi; exit 1; }
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e . || { \
	  echo "Installing remitstream itself failed: the reason is above." >&2; exit 1; }
	@touch $(STAMP)
