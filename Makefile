# Each target makes its own .venv first, from the pinned versions in constraints.txt, and only once.
#   make demo ARGS="--steps 60"     make quick     make test ARGS="tests/report -k picture"     make lint

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test quick lint clean

demo: $(VENV)/report.stamp
	@$(BIN)/soonest demo $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS)

quick: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS) @tests/quick.txt

lint: $(VENV)/test.stamp $(VENV)/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: it is by far the largest, and an edit of pyproject.toml does not repeat it.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "soonest needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in make PYTHON=python3.12" \
	  >&2; exit 1; }
	@echo "Setting up $(VENV) (once; torch is large)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@touch $@

$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "Installing soonest[$*]"
	@$(PIP) -e '.[$*]'
	@touch $@
