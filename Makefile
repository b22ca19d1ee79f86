# make run   builds, installs into .venv and opens the interactive prompt (needs Python >= 3.10, a C++17 compiler)
# make test  builds, installs and runs every test, a file at a time on each processor
# make check style, types and tests of what changed since the branch left main, in a minute; prints what it leaves out
# make docs  builds the pages of docs/ into build/site; a broken link or anchor is an error
# make stub  writes hrmcore/_C.pyi, the native module's signatures, anew
# make cuda  compiles the CUDA kernels for every target and checks what ptxas says of them, and the decode step's code
#            (needs nvcc, no GPU)
# make sanitize  runs the tests of the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make aarch64   builds for aarch64 and runs the native tests under qemu-user (needs Debian's g++-aarch64-linux-gnu and
#            qemu-user-static); counts the instructions of the GEMM's loops there
# make fuzz      breaks the file of every reader at random for FUZZ_SECONDS (600); faults are kept in build/fuzz/
# make fuzz-native  the same for the C++ core, with libFuzzer and the sanitizers (needs clang)
# make tsan      runs the engine under ThreadSanitizer (GCC): batches of requests that are cancelled at random, then
#                eight threads and an event loop on one engine for TSAN_SECONDS (300)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD_TOOLS := "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh cmake/*)
CXX_FILES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: run test check lint format stub docs cuda cuda-table sanitize fuzz fuzz-native tsan aarch64 clean

run: $(VENV)/installed
	$(BIN)/hrmcore repl

# The processes share the processors: threads that wait must not spin.
test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadscope --durations=20

check: $(VENV)/installed-dev
	PYTHONPATH=tests $(BIN)/python -m support.changed_rooms

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

# What mypy sees of the native module.
stub: $(VENV)/installed-dev
	$(BIN)/python cmake/make_stub.py > build/_C.pyi
	mv build/_C.pyi hrmcore/_C.pyi

CUDA_LOG := build/cuda/ptxas.log
DECODE_OBJECT := build/cuda/CMakeFiles/_C_cuda.dir/csrc/decode/decode_step.cu.o

$(CUDA_LOG): $(VENV)/installed-dev $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset cuda \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/cuda --target clean
	$(BIN)/cmake --build build/cuda --target _C_cuda > $@.part 2>&1 || { cat $@.part; exit 1; }
	mv $@.part $@

cuda: $(CUDA_LOG)
	$(BIN)/python cmake/check_ptxas.py $(CUDA_LOG) csrc/ptxas.txt
	PYTHONPATH="$(CURDIR)" $(BIN)/python cmake/check_sass.py $(DECODE_OBJECT) csrc/sass.txt bench/gpu/step_counts.json

cuda-table: $(CUDA_LOG)
	$(BIN)/python cmake/check_ptxas.py $(CUDA_LOG) csrc/ptxas.txt --update
	PYTHONPATH="$(CURDIR)" $(BIN)/python cmake/check_sass.py $(DECODE_OBJECT) csrc/sass.txt bench/gpu/step_counts.json --update

sanitize: $(VENV)/installed-dev
	VENV="$(VENV)" CXX="$(CXX)" tests/soak/instrumented.sh asan

FUZZ_SECONDS ?= 600

fuzz: $(VENV)/installed-dev
	PYTHONPATH=tests FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m fuzz.run

CLANG ?= clang++
FUZZ_CORPUS := build/fuzz-native

fuzz-native: $(VENV)/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset fuzz -DCMAKE_CXX_COMPILER="$(CLANG)" \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/fuzz-native-build --target fuzz_native
	mkdir -p $(FUZZ_CORPUS)/corpus
	cd $(FUZZ_CORPUS) && ../fuzz-native-build/fuzz_native corpus -max_total_time=$(FUZZ_SECONDS) -timeout=5 \
	  -rss_limit_mb=2048 -malloc_limit_mb=1024 -max_len=4096 -len_control=20 -print_final_stats=1

TSAN_BATCHES ?= 200
TSAN_SECONDS ?= 300

tsan: $(VENV)/installed-dev
	VENV="$(VENV)" CXX="$(CXX)" tests/soak/instrumented.sh tsan $(TSAN_BATCHES) $(TSAN_SECONDS)

aarch64: $(VENV)/installed-dev
	VENV="$(VENV)" tests/soak/aarch64.sh

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
