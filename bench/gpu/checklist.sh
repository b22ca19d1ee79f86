#!/usr/bin/env bash
# One command for the day a GPU is at hand: builds the CUDA kernels there and runs bench/gpu/checklist.py, in under 20
# minutes. Needs nvcc, and a CUDA build of torch in the environment whose python runs it; the last line is the JSON.
# Exit status: 0 nothing failed, 1 something did, 2 there is no GPU and --emulated is not given.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q "^GPU"; then
  cmake -S . -B build/gpu -G Ninja -DHRMCORE_CUDA=ON -DHRMCORE_EMULATOR=OFF \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/hrmcore" -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >&2
  cmake --build build/gpu --target _C_cuda _C_hardware >&2
fi
exec "$python" -m bench.gpu.checklist "$@"
