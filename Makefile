# Two commands do everything by themselves on a fresh machine: `make quickstart` and `make test`.
.PHONY: quickstart test test-all lint lock clean help
.DEFAULT_GOAL := help

BIN := .venv/bin
EUROLLM := $(BIN)/eurollm
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt
STARTER := data/starter

help:
	@echo "make quickstart  fetch a corpus in 44 languages, train, evaluate and export a small model, write a report (10 to 15 minutes on 2 cores)"
	@echo "make test        all fast tests, the comparison with Hugging Face transformers among them"
	@echo "make test-all    the slow ones too"
	@echo "make lint        ruff and mypy"
	@echo "make lock        write constraints.txt anew from pyproject.toml"
	@echo "make clean       remove the environment and caches; data/ and runs/ stay"

# Each line can be run again at any time: what is already there is kept, and training goes on where it stopped.
quickstart: .venv/.ready
	$(EUROLLM) corpus starter --out $(STARTER)
	$(EUROLLM) tokenizer train $(STARTER)/train --vocab-size 2048 --out $(STARTER)/tokenizer
	$(EUROLLM) tokenizer report $(STARTER)/tokenizer $(STARTER)/heldout --json $(STARTER)/tokenizer/report.json
	$(EUROLLM) corpus prepare $(STARTER)/train --tokenizer $(STARTER)/tokenizer --out $(STARTER)/store/train
	$(EUROLLM) corpus prepare $(STARTER)/heldout --tokenizer $(STARTER)/tokenizer --out $(STARTER)/store/heldout
	$(EUROLLM) train experiments/quickstart.py
	$(EUROLLM) export runs/quickstart runs/quickstart/export --overwrite
	$(EUROLLM) report runs/quickstart
	@echo "Try .venv/bin/eurollm generate runs/quickstart --prompt \"Die Europäische Union\""
	@echo "Then change the mixture in experiments/quickstart.py, give it another name, and train it: .venv/bin/eurollm train FILE"

test: .venv/.ready-to-test
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: .venv/.ready-to-test-all
	$(BIN)/python -m pytest -n 2

lint: .venv/.ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: .venv/.ready
	$(BIN)/uv pip compile --quiet --universal --python-version 3.12 --all-extras --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --upgrade pyproject.toml --output-file constraints.txt

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/uv:
	python=$$(sh scripts/find_python.sh $(MAKECMDGOALS)) && "$$python" -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' constraints.txt > .venv/uv.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.txt

.venv/.ready: .venv/bin/uv pyproject.toml constraints.txt
	$(UV_INSTALL) --editable .
	@touch $@

.venv/.ready-to-test: .venv/bin/uv pyproject.toml constraints.txt
	$(UV_INSTALL) --editable '.[dev,verify,datatrove]'
	@touch $@ .venv/.ready

.venv/.ready-to-test-all: .venv/.ready-to-test
	$(UV_INSTALL) --editable '.[dev,verify,datatrove,readers]'
	@touch $@
