#!/usr/bin/env bash
# One command of at most six minutes on a bare machine with a GPU: is the fused decode step right, how long does it take,
# and what was predicted (bench/gpu/speed.py). Needs torch with CUDA and the built libraries hrmcore/_C*.so, which travel
# with the tree; nothing is compiled. Exit status: 0 right, 1 wrong, 2 something is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
if [[ " $* " != *" --emulated "* && ! -e hrmcore/_C_cuda.so ]]; then
  echo "hrmcore/_C_cuda.so is missing: build with -DHRMCORE_CUDA=ON and carry it along" >&2
  exit 2
fi
exec timeout --signal=INT 360 "$python" -m bench.gpu.speed "$@"
