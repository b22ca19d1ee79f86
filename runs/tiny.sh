#!/usr/bin/env bash
# Trains the embedded model from reasoning-gym problems and what people type, and installs it under hrmcore/assets/tiny.
# Needs `pip install hrmcore[demo]`; about an hour on two cores with AMX, and an hour of one core for the second run.
# Resumes where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/out/tiny
[ -d "$out/data/tokenizer" ] || python runs/tiny_data.py "$out/data"
hrmcore train runs/tiny.toml
hrmcore train runs/tiny_everyday.toml
python runs/tiny_card.py "$out-everyday/checkpoint" "$out/data/everyday/heldout.jsonl" hrmcore/assets/tiny
