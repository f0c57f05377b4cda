# make run     the whole pipeline: a dense model in; a measured, exported, registered mixture of experts out
# make help    what else there is
#
# VENV=FOLDER  use another virtual environment    PYTHON=PATH  create it with this Python (3.11, 3.12 or 3.13)
# SET="..."    settings of one run: make run SET="name=trial decompose.num_active=2"
# DASK=ADDRESS a Dask scheduler whose workers compute the single layers: make run DASK=tcp://127.0.0.1:8786
# GRID="..."   keys and values of a sweep: make sweep GRID="decompose.num_experts=4,8 --search 12"
# RECIPES=FILE SEEDS=0,1,2   what a front compares: make front SET="distill.steps=1200 data.folder=../data"

VENV ?= .venv
SET ?=
DASK ?=
# Ports of the services (default: 4200 and 5000, or the ports they already use). NOTIFY is the webhook for failed runs.
PREFECT_PORT ?=
MLFLOW_PORT ?=
NOTIFY ?=
GRID ?=
RECIPES ?= recipes/encoder.yaml
SEEDS ?= 0,1,2
TESTS ?= tests
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Without --no-compile pip compiles every module of every package; Python compiles those that a run imports.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input --no-compile
MLFLOW_DB := mlflow.db
# Versions that the lock is resolved for. The first one found creates the environment.
PYTHONS := 3.11 3.12 3.13
SUPPORTED := import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] not in '$(PYTHONS)'.split())
# Load the addresses of remote servers (docs/operations.md).
ENV := set -a; [ ! -f .env ] || . ./.env; set +a;
OF_MODEL = $(if $(MODEL),--model $(MODEL)) $(if $(VERSION),--version $(VERSION))

# Disable telemetry.
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup run up down status promote rollback serve score sweep front repro plans push pull test check bench native clean

help:
	@echo 'make run       convert, measure, export and register a model; SET="name=trial decompose.num_active=2" for other settings'
	@echo 'make sweep     run many settings; GRID="decompose.num_experts=4,8 decompose.num_active=1,2"'
	@echo 'make front     compare recipes by quality and measured speed; RECIPES=recipes/encoder.yaml SEEDS=0,1,2 SET="distill.steps=1200"'
	@echo 'make promote   make the newest version champion if it passes the gate; VERSION=N picks another version'
	@echo 'make rollback  return to the previous champion; REASON="..."'
	@echo 'make serve     serve the champion over HTTP on this machine; PORT=5001 VERSION=N'
	@echo 'make score     score a file of texts; IN=texts.jsonl OUT=embeddings.parquet VERSION=N'
	@echo 'make test      run the tests; TESTS="tests/test_core.py -k oracle" runs some of them'
	@echo 'make check     run ruff, mypy and import-linter'
	@echo 'make bench     time every execution plan of the export again'
	@echo 'make plans     put the plans that lost back into exports/NAME, to race them elsewhere; NAME=trial'
	@echo 'make native    compile the experts operator for OpenVINO (needs a C++ compiler)'
	@echo 'make repro     run the same stages with DVC alone: no Prefect, no run record'
	@echo 'make push      copy results to the DVC remote; make pull copies them from it'
	@echo 'make up        start the Prefect server, a worker and the MLflow server; PREFECT_PORT=4300 MLFLOW_PORT=5100 NOTIFY=URL'
	@echo 'make status    show what runs, the next scheduled run, and how the last one ended'
	@echo 'make down      stop the services'
	@echo 'make setup     create the environment $(VENV) from constraints.txt; every target does this first'
	@echo 'make clean     remove caches and scratch files; results, run record and environment stay'

setup: $(STAMP)

# The lock is complete, so pip resolves nothing (--no-deps), and two of them can each install a half. torch comes first
# and with its dependencies, because they differ by platform; pip takes a CPU build where one is available.
$(STAMP): constraints.txt pyproject.toml
	@set -e; \
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	    for candidate in $(addprefix python,$(PYTHONS)) python3 python; do \
	        if "$$candidate" -c "$(SUPPORTED)" 2>/dev/null; then python="$$candidate"; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo 'error: found no Python $(PYTHONS) with venv; install one (Debian, Ubuntu: apt install python3 python3-venv)' >&2; \
	        echo '       or name it: make $(or $(MAKECMDGOALS),run) PYTHON=/path/to/python3' >&2; \
	        exit 2; \
	    fi; \
	elif ! "$$python" -c "$(SUPPORTED)"; then \
	    echo "error: $$python is not Python $(PYTHONS) with venv; name another one with PYTHON=" >&2; \
	    exit 2; \
	fi; \
	echo "setup 1/4: create the virtual environment $(VENV) with $$("$$python" -V)"; \
	[ -x "$(BIN)/python" ] || "$$python" -m venv "$(VENV)"
	@echo "setup 2/4: install torch (the largest part)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@echo "setup 3/4: install $$(grep -c == constraints.txt) packages from constraints.txt (a few minutes)"
	@awk '/==/ { print > ("$(VENV)/lock-" NR % 2 ".txt") }' constraints.txt
	@printf '%s\n' "$(VENV)/lock-0.txt" "$(VENV)/lock-1.txt" | xargs -P 2 -I HALF $(PIP) --no-deps -r HALF
	@echo "setup 4/4: install ffn2moe and compile its operator for OpenVINO"
	@$(PIP) --no-deps -e .
	@$(BIN)/python -m ffn2moe.runtime.native || echo 'setup: continuing without the operator: the plans ov-native* are not available'
	@touch $@

# Create the database before parallel processes start: otherwise each tries to create it, and all but one fail.
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

front: $(STAMP) $(MLFLOW_DB)
	@$(BIN)/python -m flows.sweep run --recipes $(RECIPES) --seeds $(SEEDS) $(SET)

repro: $(STAMP) $(MLFLOW_DB)
	@$(ENV) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/dvc repro

plans: $(STAMP)
	@$(BIN)/python -m flows.plans $(NAME)

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
