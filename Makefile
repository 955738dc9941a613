# Everything is made from here. `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Real text for development, where it lies beside the checkout; nothing depends on it.
SHARED := $(abspath ../shared/data)
ifneq ($(wildcard $(SHARED)),)
export STLM_SHARED_DATA ?= $(SHARED)
export TIKTOKEN_CACHE_DIR ?= $(SHARED)/gpt2_bpe
endif
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup report test lint lab docs readme hooks pins clean distclean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/dev hooks ## create .venv with everything, and the git hooks that keep notebooks clean

report: .venv/core ## run the quickstart study on real text; ends with reports/quickstart/index.html
	$(BIN)/stlm report quickstart

test: .venv/dev lint ## run the checks, every notebook and every test, and print the coverage
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered

lint: .venv/dev ## check style, types and the floors of the house
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

lab: .venv/core ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: .venv/core ## render every notebook to _docs/index.html
	$(BIN)/python -c "from stlm.lab.reports import render_site; print('wrote', render_site())"

readme: .venv/dev ## execute nbs/index.ipynb and render it to README.md
	$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb
	$(BIN)/python -c "from stlm.lab.reports import write_readme; print('wrote', write_readme())"

hooks: ## let git keep notebooks clean and merge them cell by cell
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
		git config core.hooksPath .githooks && \
		git config merge.nbdev-merge.name "merge notebooks cell by cell" && \
		git config merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P" && \
		echo "git hooks are installed"; \
	else echo "this is not a git checkout: no hooks to install"; fi

pins: .venv/dev ## write the versions in .venv to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed -nE 's/^([A-Za-z0-9._-]+==[^+ ]+)(\+[^ ]*)?$$/\1/p' > constraints.new
	mv constraints.new constraints.txt

clean: ## remove what tests and tools leave behind, not .venv, runs or reports
	rm -rf _docs _proc artifacts build dist *.egg-info .coverage* .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find nbs stlm tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf .venv

# The two stamps are newer than what they were installed from, so a second run installs nothing.
.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "stlm needs Python 3.11 or later and found $$($(PYTHON) --version 2>/dev/null || echo no $(PYTHON)); name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/core: .venv/python settings.ini setup.py constraints.txt
	@echo "installing stlm and what it needs; the first time takes a few minutes"
	$(PIP) -e .
	@touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	@touch $@
