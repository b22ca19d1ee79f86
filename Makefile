# make run   builds, installs into .venv and opens the interactive prompt (needs Python >= 3.10, a C++17 compiler)
# make test  builds, installs and runs every test, a file at a time on each processor
# make docs  builds the pages of docs/ into build/site; a broken link or anchor is an error
# make cuda  compiles the CUDA kernels for every target and checks what ptxas says of them (needs nvcc, no GPU)
# make sanitize  runs the tests of ops, core and engine under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make tsan      runs the engine under ThreadSanitizer (GCC): batches of requests that are cancelled at random

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD_TOOLS := "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh cmake/*)
CXX_FILES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: run test lint format docs cuda cuda-table sanitize tsan clean

run: $(VENV)/installed
	$(BIN)/hrmcore repl

# The processes share the processors: threads that wait must not spin.
test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadscope

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

CUDA_LOG := build/cuda/ptxas.log

$(CUDA_LOG): $(VENV)/installed-dev $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/cuda -G Ninja -DHRMCORE_CUDA=ON -DHRMCORE_EMULATOR=OFF \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/cuda --target clean
	$(BIN)/cmake --build build/cuda --target _C_cuda > $@.part 2>&1 || { cat $@.part; exit 1; }
	mv $@.part $@

cuda: $(CUDA_LOG)
	$(BIN)/python cmake/check_ptxas.py $(CUDA_LOG) csrc/ptxas.txt

cuda-table: $(CUDA_LOG)
	$(BIN)/python cmake/check_ptxas.py $(CUDA_LOG) csrc/ptxas.txt --update

# The tests run from an environment and a folder of their own: the editable install, or the sources in the working
# directory, would win over the instrumented module. Python's own leaks are not ours to report.
SANITIZED := build/sanitize
SANITIZERS = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))
SITE_PACKAGES := -c "import site; print(site.getsitepackages()[0])"

sanitize: $(VENV)/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_COMPILER=$(CXX) -DHRMCORE_SANITIZE=address,undefined \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build $(SANITIZED)
	$(BIN)/python -m venv --without-pip --clear $(SANITIZED)/venv
	site="$$($(SANITIZED)/venv/bin/python $(SITE_PACKAGES))" && cp -r hrmcore "$$site" && \
	  $(BIN)/cmake --install $(SANITIZED) --prefix "$$site" && $(BIN)/python $(SITE_PACKAGES) > "$$site/dev.pth"
	cd $(SANITIZED) && LD_PRELOAD="$(SANITIZERS)" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	  venv/bin/python "$(CURDIR)/$(BIN)/pytest" -c "$(CURDIR)/pyproject.toml" -p no:cacheprovider --capture=sys \
	  "$(CURDIR)/tests/ops" "$(CURDIR)/tests/test_core.py" "$(CURDIR)/tests/test_optim.py" "$(CURDIR)/tests/test_sophia.py" \
	  "$(CURDIR)/tests/engine/test_engine_core.py" "$(CURDIR)/tests/test_position_encoding.py" -k "not opcheck and not twice and not memory and not emulated and not schedule and not on_cuda"
	cd $(SANITIZED) && printf "leak:%s\n" bin/python libpython lib-dynload numpy openblas ld-linux > not_ours.txt && \
	  LD_PRELOAD="$(SANITIZERS)" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=1:malloc_context_size=3 \
	  LSAN_OPTIONS=suppressions=not_ours.txt venv/bin/python "$(CURDIR)/tests/soak/leaks.py" 20

# Without address space randomisation, because ThreadSanitizer knows only some layouts. Nothing is suppressed.
RACED := build/tsan
RACE_DETECTORS = $(foreach name,libtsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))
TSAN_BATCHES ?= 200

tsan: $(VENV)/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(RACED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_COMPILER=$(CXX) -DHRMCORE_SANITIZE=thread \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build $(RACED)
	$(BIN)/python -m venv --without-pip --clear $(RACED)/venv
	site="$$($(RACED)/venv/bin/python $(SITE_PACKAGES))" && cp -r hrmcore "$$site" && \
	  $(BIN)/cmake --install $(RACED) --prefix "$$site" && $(BIN)/python $(SITE_PACKAGES) > "$$site/dev.pth"
	cd $(RACED) && LD_PRELOAD="$(RACE_DETECTORS)" TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 \
	  setarch -R venv/bin/python "$(CURDIR)/tests/soak/stress.py" $(TSAN_BATCHES) 2

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
