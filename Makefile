.DEFAULT_GOAL := help
VENV := .venv
PYTHON := $(shell command -v python3.11 || command -v python3)
DATA ?=

help: ## What can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Make .venv with core-seg in it (about four minutes)

$(VENV)/.installed: requirements.txt pyproject.toml
	@echo "Installing into $(VENV) from requirements.txt: about four minutes, 6 GB ..."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true  # on all cores; pip takes one
	@touch $@
	@echo "Installed. Try: $(VENV)/bin/core-seg --help"

demo: install ## Train on synthetic lesions and open the page (about 12 minutes); DATA=path/to/manifest.jsonl for your own
	$(VENV)/bin/core-seg demo $(if $(DATA),--data $(DATA))

test: install ## Run the tests (12 to 15 minutes, fewer with AVX-512), a file at a time on each of two cores
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

app: install ## Open the lab with releases/ and runs/
	$(VENV)/bin/core-seg app

lint: install ## Check style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@git ls-files '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 400 {print "Warning: " $$2 " has " $$1 " lines; look for its second subject"}'

.PHONY: help install demo test app lint
