# What a newcomer types: `make demo` and `make test`. Everything runs from .venv, which `make install` keeps up to date.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install pull demo serve stop check audit docs dist sbom licences redis prometheus chromium tools llama-cpp \
  nvrtc engines test bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BACKBONE := smollm2-135m-instruct
SOURCES := models service clients tests benchmarks reports deploy docs
# `make serve PORT=9000 MODEL=NAME_OR_DIR` changes what it serves.
PORT ?= 8000
MODEL ?= $(BACKBONE)
PIDFILE := runs/serve.pid
# `make bench BENCH=benchmarks/NAME.py` runs one; ARGS goes to it.
BENCH ?= $(filter-out benchmarks/_%, $(wildcard benchmarks/*.py))

help:
	@echo "make demo     set up, fetch the backbone, and show what the value model does (about ten minutes)"
	@echo "make serve    start the service (PORT=8000), leave it running and print a request; make stop ends it"
	@echo "make test     all tests, on the real backbone"
	@echo "make check    formatting, lint, types, import rules"
	@echo "make bench    every script in benchmarks/ (BENCH=benchmarks/NAME.py for one, ARGS=... for its arguments)"
	@echo "make docs     the documentation's site, into build/site"
	@echo "make dist     source distribution and wheel, into dist; make sbom and make licences say what comes with them"
	@echo "make install  only set up .venv (PYTHON=python3.12 chooses the interpreter)"
	@echo "make clean    remove .venv and all caches"

install: $(STAMP)

# The stamp is older than what it was made from only when there is something to do.
$(STAMP): pyproject.toml constraints.txt models/lenvm/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
	  || { echo "error: no venv module: install it first (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs,export,train,ray,otel,ui,dev]'
	@touch $@

pull: install
	$(BIN)/lenvm pull $(BACKBONE)

demo: install
	$(BIN)/lenvm demo

# Stays up when make has ended; `make stop` ends it. MODEL and ARGS go to lenvm serve.
serve: pull
	@mkdir -p runs
	@if [ -f $(PIDFILE) ] && kill -0 "$$(cat $(PIDFILE))" 2> /dev/null; then \
	  echo "error: a service of ours runs already (process $$(cat $(PIDFILE))): make stop first" >&2; exit 1; fi
	@nohup $(BIN)/lenvm serve --port $(PORT) --model $(MODEL) $(ARGS) > runs/serve.log 2>&1 < /dev/null & echo $$! > $(PIDFILE)
	@until grep -q "^lenvm is ready" runs/serve.log; do \
	  kill -0 "$$(cat $(PIDFILE))" 2> /dev/null || { grep "^error" runs/serve.log >&2 || tail -3 runs/serve.log >&2; exit 1; }; \
	  sleep 0.2; done
	@grep "^lenvm is ready" runs/serve.log
	@echo "Try:   curl -s localhost:$(PORT)/predict_length -d '{\"prompt\": \"Why is the sky blue?\"}'"
	@echo "Docs:  http://localhost:$(PORT)/docs   log: runs/serve.log   stop: make stop"

stop:
	@[ -f $(PIDFILE) ] || { echo "error: no service was started by make serve" >&2; exit 1; }
	@kill "$$(cat $(PIDFILE))" 2> /dev/null || true
	@for i in $$(seq 400); do kill -0 "$$(cat $(PIDFILE))" 2> /dev/null || break; sleep 0.1; done
	@rm -f $(PIDFILE); echo "stopped"

check: install
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/mypy
	$(BIN)/lint-imports

# A warning (a dead link, a page that is nowhere in the navigation) is an error. The variable silences an advertisement.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from the source distribution, so that both are complete.
dist: install
	rm -rf dist
	$(BIN)/python -m build

# What users get with lenvm, as a CycloneDX document, and its licences as a table.
sbom: install
	$(BIN)/python deploy/sbom.py

licences: install
	@$(BIN)/python deploy/sbom.py --licences

redis:
	@command -v redis-server > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server; \
	  else echo "error: the tests need a redis-server: install it first (on Debian: apt-get install redis-server)" >&2; exit 1; fi; }

prometheus:
	@command -v prometheus > /dev/null && command -v promtool > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus; \
	  else echo "error: the tests need prometheus: install it first (on Debian: apt-get install prometheus)" >&2; exit 1; fi; }

chromium:
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	  else echo "error: the tests need chromium and chromedriver: install them first (on Debian: apt-get install chromium chromium-driver)" >&2; exit 1; fi; }

# helm, hadolint and schemas, which check deploy/, into build/tools.
tools: install
	@$(BIN)/python tests/support/deploy_tools.py

# llama-cpp-python, which tests alone use, into build/llama-cpp.
llama-cpp: install
	@$(BIN)/python tests/support/llama_cpp_wheel.py

# The compiler of CUDA C++, with which a test compiles our kernel, into build/nvrtc.
nvrtc: install
	@$(BIN)/python tests/support/nvrtc_wheel.py

# The interface files of vLLM, SGLang, Dynamo and llama-cpp-python, which tests read, into build/engines.
engines: install
	@$(BIN)/python tests/support/engine_sources.py

# Known vulnerabilities of the pinned versions, by PyPI's advisories.
audit: install
	@if curl -sf -m 20 -o /dev/null https://pypi.org/pypi/pip/24.0/json; then \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --target build/audit pip-audit==2.10.1 \
	    && PYTHONPATH=build/audit $(BIN)/python -m pip_audit --disable-pip --no-deps -r constraints.txt; \
	else echo "audit: not run: PyPI's advisories cannot be reached from here"; fi

# With the backbone there, nothing may be skipped for want of it.
test: pull redis prometheus chromium tools llama-cpp nvrtc engines
	LENVM_REQUIRE_REAL=1 $(BIN)/python -m pytest $(ARGS)

bench: pull
	@[ -n "$(strip $(BENCH))" ] || { echo "error: benchmarks/ holds no script" >&2; exit 1; }
	@for script in $(BENCH); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} + 2> /dev/null || true
