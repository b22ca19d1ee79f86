#!/usr/bin/env bash
# Trains the embedded model from reasoning-gym problems and installs it under hrmcore/assets/tiny.
# Needs `pip install hrmcore[demo]`; about an hour on two cores with AMX. Resumes where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/out/tiny
[ -d "$out/data/tokenizer" ] || python runs/tiny_data.py "$out/data"
hrmcore train runs/tiny.toml
python runs/tiny_card.py "$out/checkpoint" "$out/data/heldout.jsonl" hrmcore/assets/tiny
