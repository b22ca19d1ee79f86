#!/usr/bin/env bash
# Builds hrmcore with sanitizers and runs what each of them is for. Needs GCC and an environment that make has set up.
#   tests/soak/instrumented.sh asan             the tests marked `native`, then leaks.py under LeakSanitizer
#   tests/soak/instrumented.sh tsan [BATCHES [SECONDS]]   stress.py: batches of requests that are cancelled at random;
#                                               crowd.py: eight threads and an event loop on one engine
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
preset=$1
build=$root/build/$preset
bin=$(realpath -s "${VENV:-.venv}")/bin
export PATH=$bin:$PATH

cmake --preset "$preset" -DCMAKE_CXX_COMPILER="${CXX:-g++}" \
  -DPython_EXECUTABLE="$bin/python" -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)"
cmake --build "$build"

# The tests run from an environment and a folder of their own: the editable install, or the sources in the working
# directory, would win over the instrumented module.
packages() { "$1" -c "import sys; print(*[path for path in sys.path if path.endswith('-packages')], sep='\n')"; }
"$bin/python" -m venv --without-pip --clear "$build/venv"
site=$(packages "$build/venv/bin/python")
cp -r hrmcore "$site"
rm -f "$site"/hrmcore/_C*.so
cmake --install "$build" --prefix "$site"
packages "$bin/python" > "$site/dev.pth"

# Python itself is not instrumented: the sanitizers' libraries must be loaded before it.
instrumented() {
  local libraries=() library
  for library in "${preloaded[@]}"; do libraries+=("$("${CXX:-g++}" -print-file-name="$library")"); done
  LD_PRELOAD="${libraries[*]}" "$@"
}

cd "$build"
case $preset in
  asan)
    preloaded=(libasan.so libubsan.so libstdc++.so.6)
    export PYTHONMALLOC=malloc
    # conftest.py loads the emulator; none of its tests runs here, so the environment's own will do.
    cp "$("$bin/python" -c "from hrmcore import _C; from pathlib import Path; print(Path(_C.__file__).with_name('_C_emulated.so'))")" \
      "$site/hrmcore"
    mapfile -t files < <(grep -rl --include="test_*.py" "pytest\.mark\.native" "$root/tests" | sort)
    ASAN_OPTIONS=detect_leaks=0 instrumented venv/bin/python -m pytest -c "$root/pyproject.toml" -p no:cacheprovider \
      --capture=sys -m "native and not (emulated or inside_torch or memory)" "${files[@]}"
    # Python's own leaks are not ours to report.
    printf "leak:%s\n" bin/python libpython lib-dynload numpy openblas ld-linux > not_ours.txt
    ASAN_OPTIONS=detect_leaks=1:malloc_context_size=3 LSAN_OPTIONS=suppressions=not_ours.txt \
      instrumented venv/bin/python "$root/tests/soak/leaks.py" 20
    ;;
  tsan)
    # Without address space randomisation, because ThreadSanitizer knows only some layouts. Nothing is suppressed.
    preloaded=(libtsan.so libstdc++.so.6)
    export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
    instrumented setarch -R venv/bin/python "$root/tests/soak/stress.py" "${2:-200}" 2
    instrumented setarch -R venv/bin/python "$root/tests/soak/crowd.py" "${3:-300}"
    ;;
esac
