# Everything runs in .venv, made here. `make demo` and `make test` need nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs bench bench-engines bench-gpu bench-sync zoo sanitize chromium clean

demo: .venv/ready
	$(BIN)/normkit study speed --out runs/demo

# Two files at a time: many tests wait for processes of their own.
test: .venv/ready chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every page and table that is made from the code or from committed results.
docs: .venv/ready
	$(BIN)/python docs/norms.py
	$(BIN)/python docs/tools.py
	$(BIN)/python docs/results/make.py
	$(BIN)/python docs/make/layers.py
	$(BIN)/python benchmarks/render.py --no-picture

# Twenty minutes alone on the machine; other load falsifies it.
bench: .venv/ready
	$(BIN)/normkit bench --out benchmarks/results/cpu.json
	$(BIN)/python benchmarks/render.py

# Some minutes alone on the machine: a study's runs on a Ray cluster against local processes.
bench-engines: .venv/ready
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/render.py --no-picture

# On a machine with an NVIDIA GPU, with its own Python, torch and triton: conformance, ResNet-50, the
# table. ARGS="--stages table --only bfloat16 --seconds 540" makes it part by part.
bench-gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --out benchmarks/results/gpu.json $(ARGS)

# Two processes on gloo, two minutes alone on the machine.
bench-sync: .venv/ready
	$(BIN)/python benchmarks/sync.py --out benchmarks/results/sync.json
	$(BIN)/python benchmarks/render.py --no-picture

# Swap and fold on models of timm and transformers that docs/results/zoo.json lacks: an hour or two.
zoo: .venv/ready
	$(BIN)/python docs/zoo.py run
	$(BIN)/python docs/zoo.py

# The core's tests and timm models under AddressSanitizer and UBSan, in a copy of the package. The
# objects are kept: what hasn't changed isn't compiled again.
SANITIZED = PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)"
sanitize: .venv/ready
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r src/normkit build/sanitize/
	rm -f build/sanitize/normkit/_cpu* build/sanitize/normkit/_eager*
	NORMKIT_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-temp build/sanitize-objects --build-lib build/sanitize
	$(SANITIZED) $(BIN)/python -m pytest tests/test_cpu.py tests/test_oracle.py -p no:cacheprovider -s
	for set in avx2 avx512; do \
	  NORMKIT_CPU=$$set $(SANITIZED) $(BIN)/python tests/models_in_every_layout.py || exit 1; done

# torch first and pinned: a plain `torch` resolves to a build with gigabytes of CUDA. timm, in the
# tests, needs a torchvision, and each torchvision fits one torch.
.venv/ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -c "from importlib.metadata import version as v; v('torchvision')" 2>/dev/null || \
	  $(BIN)/python -m pip install -q torch==2.13.0 torchvision==0.28.0
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[lab,test,dev]"
	touch $@

# The report's tests drive a real browser.
chromium:
	@command -v chromium >/dev/null || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium; }

clean:
	rm -rf .venv build src/*.egg-info
