#!/usr/bin/env bash
# Builds hrmcore for aarch64 and runs its native tests under qemu-user: every instruction set that the emulator has.
#   tests/soak/aarch64.sh [PYTEST ARGUMENTS]    in place of all native tests; paths are absolute
# Needs an environment that make has set up, and of Debian or Ubuntu g++-aarch64-linux-gnu, qemu-user-static and
# apt-get, which fetches an aarch64 Python; PyPI has the rest. Nothing is installed outside build/aarch64.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
build=$root/build/aarch64
bin=$(realpath -s "${VENV:-.venv}")/bin
torch=2.9.1 # the last release of PyPI's for aarch64 without CUDA
python=3.11
export PATH=$bin:$PATH

for tool in aarch64-linux-gnu-g++ qemu-aarch64-static apt-get; do
  command -v $tool > /dev/null || { echo "not run: no $tool (Debian: g++-aarch64-linux-gnu qemu-user-static)"; exit 1; }
done

# An aarch64 Python, unpacked beside the build: with apt's own state, so the system's stays as it is.
system=$build/system
if [ ! -e "$system/complete" ]; then
  state=$build/apt
  mkdir -p "$system" "$state"/lists/partial "$state"/archives/partial
  touch "$state/status"
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$state"
    -o Dir::State::status="$state/status" -o Dir::Cache="$state" -o APT::Install-Recommends=false -o Debug::NoLocking=1)
  "${apt[@]}" update
  "${apt[@]}" install --yes --download-only python$python-minimal libpython$python-stdlib libpython$python-dev \
    libstdc++6 libgomp1
  for package in "$state"/archives/*.deb; do dpkg-deb -x "$package" "$system"; done
  touch "$system/complete"
fi

site=$build/site
if [ ! -e "$site/complete" ]; then
  fetch=("$bin/pip" install --quiet --upgrade --target "$site" --only-binary=:all: --implementation cp
    --python-version $python)
  for glibc in 2_17 2_27 2_28; do fetch+=(--platform manylinux_${glibc}_aarch64); done
  fetch+=(--platform manylinux2014_aarch64)
  PIP_CONSTRAINT='' "${fetch[@]}" --no-deps torch==$torch
  "${fetch[@]}" -c constraints.txt numpy safetensors sentencepiece tokenizers pytest hypothesis prompt_toolkit tqdm \
    filelock sympy networkx jinja2 fsspec typing_extensions
  # A child that a test starts goes through the emulator, too.
  echo 'import os, sys; sys.executable = os.environ["EMULATED_PYTHON"]' > "$site/sitecustomize.py"
  touch "$site/complete"
fi

emulated=$build/python
cat > "$emulated" << EOF
#!/bin/sh
exec qemu-aarch64-static -cpu "\${EMULATED_CPU:-max}" -L "$system" "$system/usr/bin/python$python" "\$@"
EOF
chmod +x "$emulated"

cmake --preset aarch64 -DPython_EXECUTABLE="$bin/python" -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" \
  -DPython_INCLUDE_DIR="$system/usr/include/python$python" -DCMAKE_CXX_FLAGS="-idirafter $system/usr/include" \
  -DPYTHON_MODULE_EXTENSION=.so
cmake --build "$build"
rm -rf "$site/hrmcore"
cp -r hrmcore "$site"
rm -f "$site"/hrmcore/_C*.so
cmake --install "$build" --prefix "$site" > /dev/null

"$bin/python" cmake/check_neon.py "$build" csrc/neon.txt

"$bin/python" tests/soak/across_machines.py write "$build/here.npz"

export EMULATED_PYTHON=$emulated PYTHONPATH=$site:$root/tests OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
cd "$build"
while read -r cpu expected; do # what is found on a processor without, and with
  found=$(EMULATED_CPU=$cpu "$emulated" -c 'from hrmcore import _C; print(*_C.supported_isas(), sep=",")')
  [ "$found" = "$expected" ] || { echo "on $cpu: $expected was expected, found $found"; exit 1; }
done << 'EOF'
cortex-a53 generic
cortex-a76 generic,dotprod
max generic,dotprod,i8mm
EOF
"$emulated" "$root/tests/soak/across_machines.py" compare here.npz

if [ $# -eq 0 ]; then
  mapfile -t files < <(grep -rl --include="test_*.py" "pytest\.mark\.native" "$root/tests" | sort)
  set -- -m "native and not (emulated or inside_torch or memory or slow)" "${files[@]}"
fi
"$emulated" -m pytest -c "$root/pyproject.toml" -p no:cacheprovider "$@"
