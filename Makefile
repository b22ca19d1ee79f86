# make run   builds, installs into .venv and opens the interactive prompt (needs Python >= 3.10, a C++17 compiler)
# make test  builds, installs and runs every test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD_TOOLS := "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h cmake/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: run test lint format sanitize clean

run: $(VENV)/installed
	$(BIN)/hrmcore repl

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build $(VENV)

$(BIN)/cmake:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet $(BUILD_TOOLS)

$(VENV)/installed: $(BIN)/cmake $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@
