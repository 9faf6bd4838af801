# Thin wrappers around `lra`; `make help` lists them. Needs GNU make, bash and Python 3.11 to 3.14.
SHELL := bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# variables of the command line: make listops ARCH=gru SEED=1
ARCH := s4d
RECIPE := auto
SEED := 0
TIME :=
OP :=
K :=
ARGS :=
JOBS := auto
PYTHON :=
# UV= installs with pip
UV := uv
# make recipes read these from the environment, so that values need no quoting
export ARCH RECIPE SEED TIME OP K PYTHON UV

TASKS := listops text retrieval image pathfinder pathx pathfinder64 path256
VENV := .venv/bin
RUN := $(VENV)/python -m

.PHONY: help setup $(TASKS) leaderboard report profile diagnose bench doctor campaign gpu test test-all test-gpu test-faults test-oldest test-newest check docs fix clean

help: ## list the targets and variables
	@awk -F ': *## ' '/^[a-z0-9-]+: *## / { printf "  %-14s%s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  variables: ARCH=s4d (any of 'lra list', name/variant, or file.py:Class)  RECIPE=auto  SEED=0  TIME=8m"
	@echo "             K=name (tests to run)  OP=name (operator to time)  ARGS='more options of the lra command'"

setup: ## create or update .venv; every other target does this when needed
listops: ## ListOps: nested operations on digits, up to 2,000 tokens, 10 classes
text: ## Text: sentiment of film reviews as bytes, up to 4,096, 2 classes
retrieval: ## Retrieval: does one paper cite the other? two texts as bytes, up to 4,000 each
image: ## Image: CIFAR-10 in grey, pixel by pixel, 1,024 tokens, 10 classes
pathfinder: ## Pathfinder: are two points connected? 32 x 32 pixels, 1,024 tokens, 2 classes
pathx: ## Path-X: Pathfinder at 128 x 128 pixels, 16,384 tokens
pathfinder64: ## Pathfinder at 64 x 64 pixels, 4,096 tokens
path256: ## Pathfinder at 256 x 256 pixels, 65,536 tokens
leaderboard: ## write the tables of all results
report: ## write all results and figures to one HTML file
profile: ## measure speed, memory and FLOPs of ARCH, by default of all architectures
diagnose: ## train ARCH on the generated diagnostic tasks and show what it solves; ARGS='--tasks parity,mqar'
bench: ## time the operator OP, by default all, and compare with the limits of this machine
doctor: ## check which operator implementations run on this machine and are correct
campaign: ## run unfinished cells of PLAN=results/campaign.toml, JOBS=2 at a time, for TIME=8m; PYTHON=python3: no .venv
gpu: ## on a machine with a GPU, without .venv: parity, times, time by kernel and launch settings in 8 minutes
test-gpu: ## on a machine with a GPU, without .venv: the operator tests that need it
test: ## run the tests, or those whose names match K
test-all: ## run all tests, those that take minutes among them
test-faults: ## tests with killed processes, full disks, corrupt files and fuzzing, 20 minutes; a short form is in test
test-oldest: ## run the tests with the oldest packages that pyproject.toml accepts, in their own environment
test-newest: ## run the tests with the newest packages, in their own environment
check: ## check lint, formatting, types and imports, then the conformance of ARCH; changes nothing
docs: ## build the documentation site in docs/_build/html; its packages are installed the first time
fix: ## fix lint and formatting
clean: ## delete .venv, builds and tool caches; keep data and results

setup: .venv/.stamp
	@echo "setup: .venv is up to date"

$(TASKS): .venv/.stamp
	@$(VENV)/lra run $@ "$$ARCH" --recipe "$$RECIPE" --seed "$$SEED" $(if $(TIME),--time-limit "$$TIME") $(ARGS)

leaderboard: .venv/.stamp
	@$(VENV)/lra leaderboard $(ARGS)

report: .venv/.stamp
	@$(VENV)/lra report $(ARGS)

profile: .venv/.stamp
	@$(VENV)/lra profile $(if $(filter command,$(origin ARCH)),"$$ARCH") $(ARGS)

diagnose: .venv/.stamp
	@$(VENV)/lra diagnose "$$ARCH" $(ARGS)

bench: .venv/.stamp
	@$(RUN) benchmarks operators $(if $(OP),"$$OP") $(ARGS)

doctor: .venv/.stamp
	@$(VENV)/lra doctor $(ARGS)

campaign: $(if $(PYTHON),,.venv/.stamp)
	@OMP_NUM_THREADS=1 PYTHONPATH=. nice -n 19 $(or $(PYTHON),$(VENV)/python) -m lra.cli sweep $(or $(PLAN),results/campaign.toml) \
	    --no-forecast --jobs $(if $(filter auto,$(JOBS)),1,$(JOBS)) $(if $(TIME),--time-limit "$$TIME") $(ARGS)

# a GPU machine may have its own torch and no network
gpu:
	@PYTHONPATH=. $(or $(PYTHON),python3) -m benchmarks gpu $(ARGS)

test-gpu:
	@PYTHONPATH=. $(or $(PYTHON),python3) -m pytest -q -m gpu $(if $(K),-k "$$K") tests $(ARGS)

# the workers use all CPUs, so each gets one thread
test: .venv/.stamp
	@OMP_NUM_THREADS=1 $(RUN) pytest -q -n $(JOBS) --dist worksteal $(if $(K),-k "$$K") $(ARGS)

test-all: .venv/.stamp
	@OMP_NUM_THREADS=1 $(RUN) pytest -q -n $(JOBS) --dist worksteal -m "slow or not slow" $(if $(K),-k "$$K") $(ARGS)

test-faults: .venv/.stamp
	@LRA_FAULTS=full OMP_NUM_THREADS=1 $(RUN) pytest -q -n $(JOBS) --dist loadgroup $(if $(K),-k "$$K") tests/faults $(ARGS)

# old packages warn about newer ones, so warnings are not errors here
# PIP='--index-url ...' chooses the index of a CPU build of torch
OLDEST := import re, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    print(*(re.sub(r">=([\d.]+)", r"==\1", d) for d in p["dependencies"] + p["optional-dependencies"]["dev"]), sep="\n")

test-oldest: .venv/.stamp
	@$(VENV)/python -m venv --clear .cache/oldest
	@$(VENV)/python -c '$(OLDEST)' > .cache/oldest/constraints.txt
	@.cache/oldest/bin/python -m pip install -q -c .cache/oldest/constraints.txt $(PIP) -e '.[dev]'
	@OMP_NUM_THREADS=1 .cache/oldest/bin/python -m pytest -q -n $(JOBS) -W default $(if $(K),-k "$$K") $(ARGS)

test-newest: .venv/.stamp
	@$(VENV)/python -m venv --clear .cache/newest
	@.cache/newest/bin/python -m pip install -q $(PIP) -e '.[dev]'
	@OMP_NUM_THREADS=1 .cache/newest/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(if $(K),-k "$$K") $(ARGS)

check: .venv/.stamp
	@mkdir -p .cache
	@$(RUN) ruff check --quiet .
	@$(RUN) ruff format --check --quiet .
	@$(RUN) mypy
	@$(RUN) mypy --python-version $(NEWEST)
	@PYTHONPATH=. $(VENV)/lint-imports --no-cache > .cache/imports.txt || { cat .cache/imports.txt; exit 1; }
	@$(VENV)/lra check "$$ARCH"

docs: .venv/.stamp
	@$(VENV)/python -c "import furo, myst_parser" 2> /dev/null || $(RUN) pip install -q -c constraints.txt -e '.[docs]'
	@PYTHONPATH=. $(VENV)/python docs/pages.py docs/_build/source
	@$(RUN) sphinx -q -W --keep-going -c docs docs/_build/source docs/_build/html
	@echo "wrote docs/_build/html/index.html"

fix: .venv/.stamp
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

clean:
	rm -rf .venv .cache/oldest .cache/newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find lra/ architectures kernels tasks tests -name __pycache__ -prune -exec rm -rf {} +

# the stamp holds the path of the checkout: an environment does not work after the checkout is moved
ifneq ($(shell test -x $(VENV)/python && cat .venv/.stamp 2>/dev/null),$(CURDIR))
.PHONY: .venv/.stamp
endif

USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
NEWEST := 3.14

.venv/.stamp: pyproject.toml constraints.txt
	@set -euo pipefail; \
	usable() { "$$1" -c '$(USABLE)' 2>/dev/null; }; \
	if ! usable $(VENV)/python || { test -e $@ && test "$$(cat $@)" != "$$(pwd -P)"; }; then \
	    found=; \
	    if test -n "$$PYTHON"; then set -- "$$PYTHON"; else set -- python3 python3.14 python3.13 python3.12 python3.11 python; fi; \
	    for name in "$$@"; do \
	        if usable "$$name"; then found=$$name; break; fi; \
	    done; \
	    if test -z "$$found"; then \
	        echo "setup: no usable Python: needs 3.11, 3.12, 3.13 or 3.14 with venv (on Debian and Ubuntu the package" \
	            "python3-venv); tried $$*;" \
	            "python3 is '$$(python3 --version 2>&1 | head -n 1)'. Name another: make setup PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "setup: making .venv with $$("$$found" --version)"; \
	    "$$found" -m venv --clear .venv; \
	fi; \
	rm -f $@; \
	echo "setup: installing what pyproject.toml and constraints.txt ask for (a few minutes the first time)"; \
	wanted=(-c constraints.txt -e '.[dev]'); \
	shown='^ *(Downloading [^ ]+ \([0-9.]+ ?[MG]i?B\)|Install(ing|ed) .*packages)'; \
	install() { "$$@" 2>&1 | tee .venv/setup.log | { grep --line-buffered -oE "$$shown" || true; }; }; \
	with=; \
	if command -v "$$UV" > /dev/null; then \
	    if install "$$UV" pip install --python $(VENV)/python "$${wanted[@]}"; then with=", with uv"; \
	    else echo "setup: uv failed ($$(grep -im 1 error .venv/setup.log)); trying pip" >&2; fi; \
	fi; \
	if test -z "$$with" && ! install $(RUN) pip --disable-pip-version-check install --progress-bar off --no-compile "$${wanted[@]}"; then \
	    grep -iE '^ *(ERROR|WARNING: Retry)' .venv/setup.log | tail -n 5 >&2 || true; \
	    echo "setup: pip failed; its output is in .venv/setup.log; 'make setup' tries again" >&2; \
	    exit 1; \
	fi; \
	echo "setup: compiling the packages to bytecode, so that commands start faster"; \
	$(RUN) compileall -q -j 0 -x '/(tests?|testing/_internal)/' "$$($(VENV)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > /dev/null 2>&1 || true; \
	pwd -P > $@; \
	echo "setup: done$$with"
