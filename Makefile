# Everything runs in .venv, made here. `make demo` and `make test` need nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check chromium clean

demo: .venv/ready
	$(BIN)/normkit study speed --out runs/demo

test: .venv/ready chromium
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: a plain `torch` resolves to a build with gigabytes of CUDA. timm, in the
# tests, needs a torchvision, and each torchvision fits one torch.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -c "from importlib.metadata import version as v; v('torchvision')" 2>/dev/null || \
	  $(BIN)/python -m pip install -q torch==2.13.0 torchvision==0.28.0
	$(BIN)/python -m pip install -q "setuptools>=77" wheel
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[lab,test,dev]"
	touch $@

# The report's tests drive a real browser.
chromium:
	@command -v chromium >/dev/null || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium; }

clean:
	rm -rf .venv build src/*.egg-info
