# make run     the whole pipeline: a dense model in; a measured, exported, registered mixture of experts out
# make help    what else there is
#
# VENV=FOLDER  another virtual environment      PYTHON=PATH  the Python 3.11 to make it with
# SET="..."    settings of one run: make run SET="name=trial decompose.num_active=2"
# DASK=ADDRESS a Dask scheduler whose workers do what is asked of single layers: make run DASK=tcp://127.0.0.1:8786
# GRID="..."   keys with the values of a sweep: make sweep GRID="decompose.num_experts=4,8 --search 12"

VENV ?= .venv
SET ?=
DASK ?=
# Of the services; without them 4200 and 5000, or those they run on already. NOTIFY: who hears of failed runs.
PREFECT_PORT ?=
MLFLOW_PORT ?=
NOTIFY ?=
GRID ?=
TESTS ?= tests
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input
MLFLOW_DB := mlflow.db
# Addresses of servers elsewhere (docs/operations.md), where there are some.
ENV := set -a; [ ! -f .env ] || . ./.env; set +a;
OF_MODEL = $(if $(MODEL),--model $(MODEL)) $(if $(VERSION),--version $(VERSION))

# Nobody is told anything.
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup run up down status promote rollback serve score sweep repro push pull test check bench native clean

help:
	@echo 'make run     the whole pipeline; SET="name=trial decompose.num_active=2" for one run in a workspace of its own'
	@echo 'make sweep   many settings side by side; GRID="decompose.num_experts=4,8 decompose.num_active=1,2"'
	@echo 'make promote the newest registered version becomes champion, if it passes the gate; VERSION=N for another one'
	@echo 'make rollback  back to the champion before; REASON="..."'
	@echo 'make serve   the champion over HTTP, on this machine alone; PORT=5001 VERSION=N'
	@echo 'make score   a file of texts by the champion; IN=texts.jsonl OUT=embeddings.parquet VERSION=N'
	@echo 'make test    the tests; TESTS="tests/test_moe.py -k oracle" for some of them'
	@echo 'make check   ruff, mypy, import-linter'
	@echo 'make bench   time every execution plan of the export again, on this machine'
	@echo 'make native  build the fused experts operator for OpenVINO, with the C++ compiler of this machine'
	@echo 'make repro   the same stages as make run by DVC alone: no Prefect, no run record'
	@echo 'make push    results to the DVC remote, for other machines; make pull  from it'
	@echo 'make up      Prefect server, worker and MLflow server for scheduled runs; PREFECT_PORT=4300 MLFLOW_PORT=5100 NOTIFY=URL'
	@echo 'make status  what runs, the next scheduled run, how the last one ended'
	@echo 'make down    stop them'
	@echo 'make setup   the environment in $(VENV), at the versions of constraints.txt; every target does it first'
	@echo 'make clean   remove caches and scratch; results, the run record and the environment stay'

setup: $(STAMP)

# The lock is complete, so nothing is resolved (--no-deps). torch goes first: on its own it is found as a CPU build
# where one is at hand, and its platform's companions come with it.
$(STAMP): constraints.txt pyproject.toml
	@set -e; \
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	    for candidate in python3.11 python3 python; do \
	        if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; \
	        then python="$$candidate"; break; fi; \
	    done; \
	fi; \
	if [ -z "$$python" ]; then \
	    echo 'error: no Python 3.11 with venv found; install it (Debian, Ubuntu: apt install python3.11 python3.11-venv)' >&2; \
	    echo '       or name it: make $(or $(MAKECMDGOALS),run) PYTHON=/path/to/python3.11' >&2; \
	    exit 2; \
	fi; \
	echo "setup 1/4: a virtual environment in $(VENV)"; \
	[ -x "$(BIN)/python" ] || "$$python" -m venv "$(VENV)"
	@echo "setup 2/4: torch (the largest part)"
	@$(PIP) torch==2.13.0
	@echo "setup 3/4: $$(grep -c == constraints.txt) packages at the versions of constraints.txt (a few minutes)"
	@$(PIP) --no-deps -r constraints.txt
	@echo "setup 4/4: ffn2moe itself, and its operator for OpenVINO"
	@$(PIP) --no-deps -e .
	@$(BIN)/python -m ffn2moe.runtime.native || echo 'setup: goes on without the plans ov-native, ov-native8 and ov-native4'
	@touch $@

# Before anything parallel: several processes that find no database each try to make it, and all but one fail.
$(MLFLOW_DB): | $(STAMP)
	@$(ENV) $(BIN)/python -m tasks.store

run: $(STAMP) $(MLFLOW_DB)
	@$(if $(DASK),FFN2MOE_DASK='$(DASK)') $(BIN)/python -m flows.compress $(SET)

promote: $(STAMP) $(MLFLOW_DB)
	@$(BIN)/python -m flows.promote $(OF_MODEL)

rollback: $(STAMP) $(MLFLOW_DB)
	@$(BIN)/python -m flows.promote --rollback $(if $(MODEL),--model $(MODEL)) $(if $(REASON),--reason '$(REASON)')

serve: $(STAMP) $(MLFLOW_DB)
	@$(BIN)/python -m flows.serve $(OF_MODEL) $(if $(PORT),--port $(PORT))

score: $(STAMP) $(MLFLOW_DB)
	@$(BIN)/python -m flows.score '$(IN)' '$(OUT)' $(OF_MODEL)

sweep: $(STAMP) $(MLFLOW_DB)
	@$(BIN)/python -m flows.sweep run $(GRID)

repro: $(STAMP) $(MLFLOW_DB)
	@$(ENV) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/dvc repro

push pull: $(STAMP)
	@$(BIN)/python -m flows.share $@

up: $(STAMP)
	@$(BIN)/python -m flows.service up $(if $(PREFECT_PORT),--prefect-port $(PREFECT_PORT)) \
	    $(if $(MLFLOW_PORT),--mlflow-port $(MLFLOW_PORT)) $(if $(NOTIFY),--notify '$(NOTIFY)')

down: $(STAMP)
	@$(BIN)/python -m flows.service down

status: $(STAMP)
	@$(BIN)/python -m flows.service status || true

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/dvc repro --force --single-item benchmark

native: $(STAMP)
	@$(BIN)/python -m ffn2moe.runtime.native

clean:
	@[ ! -f .prefect/service/state.json ] || $(BIN)/python -m flows.service down
	@rm -rf .cache .workspaces .prefect .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
