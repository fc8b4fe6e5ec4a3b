# Two commands for a newcomer: `make demo` and `make test`. Both set up their own environment with nothing but python3.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export YOLO_OFFLINE ?= true
export YOLO_AUTOINSTALL ?= false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint check clean

demo: $(VENV)/.ready
	$(BIN)/kd-yolo demo

test: $(VENV)/.ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kd_yolo export tests benchmarks

# exact versions: the ones every committed figure was measured with
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), "Python 3.10 to 3.13 is needed, this is %d.%d; use make PYTHON=python3.12" % sys.version_info[:2]'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
