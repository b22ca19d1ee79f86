#!/usr/bin/env bash
# One command of at most seven minutes on a bare machine with a GPU: is a training step right, where its time goes, and
# what was predicted (bench/gpu/train.py). Needs torch with CUDA and the built libraries hrmcore/_C*.so, which travel with
# the tree; nothing is compiled. transformers, where it is installed, is timed beside it. Exit status: 0 right, 1 wrong,
# 2 something is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
if [[ " $* " != *" --emulated "* && ! -e hrmcore/_C_cuda.so ]]; then
  echo "hrmcore/_C_cuda.so is missing: build with -DHRMCORE_CUDA=ON and carry it along" >&2
  exit 2
fi
exec timeout --signal=INT 420 "$python" -m bench.gpu.train "$@"
