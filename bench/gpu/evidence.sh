#!/usr/bin/env bash
# The claims of bench/evidence on a machine with a GPU, within a budget of minutes, in their order of value:
#   bench/gpu/evidence.sh OUT [--minutes 10] [--claims "optimizers objectives architectures growth lengths"]
# Each claim has an equal share of what is left; what one does not need goes to the next. The same command goes on where
# the last one stood. Tables are printed and lie in OUT/CLAIM/. --minutes 0 makes the data alone, which takes minutes and
# no GPU: do that first, and carry OUT along. Needs torch with CUDA and the built libraries hrmcore/_C*.so, which travel
# with the tree; for the data, reasoning-gym. Nothing is compiled. Exit status: 0 all ran, 1 a claim failed, 2 something
# is missing.
set -euo pipefail
python="${PYTHON:-python3}" minutes=10 device=cuda claims="optimizers objectives architectures growth lengths"
if [[ $# -lt 1 || $1 == --* ]]; then
  sed -n '3p' "$0" >&2
  exit 2
fi
out=$(realpath -m "$1")
shift
while [[ $# -gt 0 ]]; do
  case "$1" in
    --minutes) minutes=$2 ;;
    --claims) claims=$2 ;;
    --device) device=$2 ;;
    *) echo "$1: not an option; there are --minutes, --claims and --device" >&2; exit 2 ;;
  esac
  shift 2
done
cd "$(dirname "$0")/../.."
if [[ $device == cuda && $minutes != 0 ]] && ! "$python" -c 'import torch; assert torch.cuda.is_available()'; then
  echo "torch finds no CUDA device; --device cpu tries this without one" >&2
  exit 2
fi
end=$(awk "BEGIN { print int($SECONDS + 60 * $minutes) }") failed=0 left=$(wc -w <<<"$claims")
mkdir -p "$out/data"
for claim in $claims; do
  share=$(((end - SECONDS) / left)) left=$((left - 1))
  mkdir -p "$out/$claim"
  [[ -e $out/$claim/data ]] || ln -s ../data "$out/$claim/data"
  if [[ $minutes == 0 ]]; then
    budget=(--table)
  elif ((share < 5)); then
    echo "$claim: left out, the time is over" >&2
    continue
  else
    budget=(--minutes "$(awk "BEGIN { print $share / 60 }")")
  fi
  "$python" -m "bench.evidence.$claim" "$out/$claim" --device "$device" "${budget[@]}" | tee "$out/$claim/table.md" || failed=1
done
exit "$failed"
