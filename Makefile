# What can be done in a clone, from nothing but python3 and make: `make help`.
# Everything runs in a virtual environment of its own, rebuilt when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# Further requirements for pip, for example: make test VENV=.venv-2.0 REQUIRE='sqlalchemy==2.0.*'
REQUIRE ?=
PYTEST_ARGS ?=
# How many processes `make test` runs tests in, each with a PostgreSQL of its own; 0 for make's child alone.
# Two for each processor, since the tests wait for servers and children half of their time.
PROCESSES ?= $(shell expr 2 '*' "$$(getconf _NPROCESSORS_ONLN)")
DEMO_ARGS ?=
BENCH_ARGS ?=
# For example: make test-versions VERSIONS_ARGS='--short 3.14'
VERSIONS_ARGS ?=
# The last resort for a test that its own time limit can't interrupt: all stacks are shown, then it ends.
TEST_SECONDS ?= 2400
# Each has a virtual environment of its own, since their pins conflict.
APPLICATIONS ?= optuna airflow mlflow superset
airflow := apache-airflow-core apache-airflow-providers-standard asyncpg
mlflow := 'mlflow>=3'
optuna := 'optuna>=4'
superset := apache-superset==6.1.0 'flask-caching<2.4' rich psycopg2-binary

export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PYTHONPATH PYTHONHOME

bin := $(VENV)/bin
pip := $(bin)/python -m pip install --quiet --editable
bounded := timeout --foreground --signal=ABRT --kill-after=30 $(TEST_SECONDS)

.PHONY: help demo bench docs test test-system test-versions test-applications soak sqlalchemy-suite lint format build clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 26

demo: $(VENV)/.demo ## fork over a real PostgreSQL with TLS: SQLAlchemy's pool, then pidpool
	$(bin)/pidpool demo $(DEMO_ARGS)

bench: $(VENV)/.bench ## measure what it costs to switch, into bench/results/ (BENCH_ARGS=--quick: see that it runs)
	$(bin)/python -m bench $(BENCH_ARGS)

docs: $(VENV)/.docs ## build the documentation into docs/_build/; a warning is an error
	$(bin)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet --builder html docs docs/_build
	@echo "docs/_build/index.html"

test: $(VENV)/.dev ## run the tests (PYTEST_ARGS='-k embedded', PROCESSES=0)
	$(bounded) $(bin)/python -m pytest -m 'not system and not applications' -n $(PROCESSES) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-system: $(VENV)/.system ## run the tests that need Chromium, MariaDB, PgBouncer, Prometheus, Redis and npm
	$(bounded) $(bin)/python -m pytest -m system $(PYTEST_ARGS)

test-versions: ## run the library's tests on Python 3.10 to 3.15 and SQLAlchemy 2.0.31 to its newest (as root)
	bash .ci/versions $(VERSIONS_ARGS)

test-applications: $(VENV)/.dev $(APPLICATIONS:%=.venv-%/.made) ## run applications of others by their database URL alone
	$(bin)/python -m pytest $(APPLICATIONS:%=tests/applications/test_%.py) $(PYTEST_ARGS)

soak: $(VENV)/.dev ## run the long forms of the tests that have one: about an hour
	PIDPOOL_SOAK=1 $(bin)/python -m pytest -m soak --timeout=7200 $(PYTEST_ARGS)

sqlalchemy-suite: $(VENV)/.dev ## run SQLAlchemy's own pool tests on pidpool
	$(bounded) $(bin)/python tests/_sqlalchemy/suite.py

lint: $(VENV)/.dev ## check style, types and which room imports which
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/lint-imports

format: $(VENV)/.dev ## put the code into the project's format
	$(bin)/ruff check --fix
	$(bin)/ruff format

build: $(VENV)/.dev ## build the wheel and the source distribution into dist/
	rm -rf dist
	$(bin)/python -m build

clean: ## remove what the other targets made
	rm -rf .venv .venv-* .versions $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache docs/_build .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
	    sys.exit(sys.version_info < (3, 10) and f"{sys.executable} is Python {v}; 3.10 is needed: make PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) can't make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(pip) '.[demo]' $(if $(REQUIRE),'$(REQUIRE)')
	@touch $@

.venv-%/.made: pyproject.toml
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-compile --editable . $($*)
	@touch $@

# Superset requires SQLAlchemy 1.4, and so can't be in one environment with pidpool: the second one has SQLAlchemy 2.0,
# and finds the rest in the first.
.venv-superset/.made: pyproject.toml
	$(PYTHON) -m venv --clear .venv-superset
	.venv-superset/bin/python -m pip install --quiet --no-compile $(superset)
	$(PYTHON) -m venv --clear .venv-superset-2
	.venv-superset-2/bin/python -m pip install --quiet --no-compile --editable '.[cli]' 'sqlalchemy==2.0.*' gunicorn
	for lib in .venv-superset/lib/python*/site-packages; do \
	    echo "$$PWD/$$lib" >".venv-superset-2/$${lib#*/}/superset.pth"; done
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(pip) '.[bench]' $(if $(REQUIRE),'$(REQUIRE)')
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(pip) '.[docs]' $(if $(REQUIRE),'$(REQUIRE)')
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(pip) '.[dev]' $(if $(REQUIRE),'$(REQUIRE)')
	@touch $@

$(VENV)/.system: $(VENV)/.dev
	$(pip) '.[system]' $(if $(REQUIRE),'$(REQUIRE)')
	@touch $@
