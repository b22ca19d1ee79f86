"""Does xPos hold beyond the lengths of training? RoPE, xPos, and xPos read through a window, at up to 16 times them.

    python -m bench.evidence.lengths OUT --hours 8 --device cpu
    python -m bench.evidence.lengths OUT --minutes 10 --device cuda

The text is the Markov chain with facts and questions of bench/studies/extrapolation.py, a letter a word, 128 of them a
record. Cells are trained and chosen as everywhere here, by the held-out loss at the training length. Then each last
one's averaged weights are read at every length: the loss of the same last 64 words with more and more before them, and
how often a fact at a distance is answered. RoPE's rise is its loss at four times the length over that at the length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.evidence import data as sets
from bench.evidence import intervals
from bench.evidence.claim import RATES, Claim, Scale, Setting, Study, main
from bench.evidence.queue import Cell
from bench.studies.extrapolation import TRAINED, VOCABULARY, WINDOW, Text
from hrmcore.checkpoint.training_state import find_newest
from hrmcore.durable import replacing
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer
from hrmcore.train.resume import model_of_state
from hrmcore.train.run_file import TrainConfig

LENGTHS, DISTANCES = (128, 256, 512, 1024, 2048), (16, 64, 96, 128, 192, 256, 512, 1024)
STREAMS, SCORED = 48, 64
LETTERS = [chr(code) for code in range(0x100, 0x100 + VOCABULARY)]  # one for each word: no digit, no space


def chain() -> Iterator[sets.Pair]:
    """Records of TRAINED words; the question is the first eight of them."""
    text = Text(1000)
    while True:
        stream = "".join(LETTERS[word] for word in text.stream(TRAINED))
        yield stream[:8], stream[8:], stream


def config(setting: Setting) -> TrainConfig:
    cycles = {"H_cycles": 2, "L_cycles": 2}
    encoding = "rope" if setting.arm == "RoPE" else "xpos"
    model = setting.scale.model(
        setting.vocabulary, prefix_lm=False, position_encoding=encoding, max_position_embeddings=4096, **cycles
    )
    return setting.config(model, objective="all", learning_rate=setting.candidate["rate"])


def forms(arm: str) -> dict[str, int]:
    """How an arm's model is read, and the attention window of each."""
    return {"RoPE": 0} if arm == "RoPE" else {"xPos": 0, f"xPos, window of {WINDOW}": WINDOW}


@torch.no_grad()
def read(model: HRM, words: list[int], streams: int = STREAMS) -> dict[str, dict[str, float]]:
    """Loss (nats a word) by context, and the share of facts answered by distance; `words` are the vocabulary's ids."""
    text, ids = Text(7), np.array(words)
    device = next(model.parameters()).device
    long = torch.tensor(ids[[text.stream(max(LENGTHS) + 1) for _ in range(streams)]], device=device)
    losses, answered = {}, {}
    for length in LENGTHS:
        logits = model(long[:, -length - 1 : -1])[:, -SCORED:]
        losses[str(length)] = float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), long[:, -SCORED:].flatten())
        )
    for distance in DISTANCES:
        asked = [text.question(distance) for _ in range(streams)]
        found = model(torch.tensor(ids[[question for question, _ in asked]], device=device))[:, -1].argmax(-1).tolist()
        answered[str(distance)] = float(
            np.mean([ids[answer] == one for (_, answer), one in zip(asked, found, strict=True)])
        )
    return {"loss": losses, "answered": answered}


def reading(study: Study, cell: Cell) -> dict[str, Any]:
    """What a finished cell's model reads at every length, in each of its forms; kept in the cell's folder."""
    folder = Path(study.config(cell).out)
    kept = folder / "lengths.json"
    step = study.curve(cell).step[-1]
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8")))["step"] == step:
        return dict(found["forms"])
    newest = find_newest(folder, print)
    if newest is None:
        raise ValueError(f"{folder}: the cell is finished and has no state")
    trained = model_of_state(newest[0])
    vocabulary = Tokenizer.load(study.data / "train" / "tokenizer")
    words = [vocabulary.encode(letter)[0] for letter in LETTERS]
    found = {}
    for form, window in forms(cell.arm).items():
        model = HRM(trained.config.replace(attention_window=window))
        model.load_state_dict(trained.state_dict())
        found[form] = read(model.to(study.scale.device).eval(), words)
    with replacing(kept) as [temporary]:
        temporary.write_text(json.dumps({"step": step, "forms": found}), encoding="utf-8")
    return found


def report(study: Study) -> list[dict[str, Any]]:
    """A line a form: losses and answers of every finished seed, and the rise of the loss to 4 x the length."""
    lines = []
    last = study.rule.rungs - 1
    for arm in study.rule.arms:
        chosen = study.rule.survivors(arm, last, study.known)
        cells = [Cell(arm, chosen[0], seed, last) for seed in range(study.rule.seeds)] if chosen else []
        found = [reading(study, cell) for cell in cells if study.known(cell) is not None]
        for form in forms(arm) if found else ():
            runs = [reads[form] for reads in found]
            rises = [run["loss"][str(4 * TRAINED)] / run["loss"][str(TRAINED)] - 1 for run in runs]
            lines.append({"form": form, "n": len(runs), "rise": intervals.of_mean(rises), "runs": runs})
    return lines


def text(lines: list[dict[str, Any]]) -> str:
    """Means over the seeds."""
    heads = ["", "n", f"rise to {4 * TRAINED:,}"]
    heads += [f"loss at {length:,}" for length in LENGTHS] + [f"fact at {distance:,}" for distance in DISTANCES]
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        losses = [f"{np.mean([run['loss'][str(n)] for run in line['runs']]):.3f}" for n in LENGTHS]
        answers = [f"{np.mean([run['answered'][str(d)] for run in line['runs']]):.2f}" for d in DISTANCES]
        rows.append([line["form"], str(line["n"]), intervals.shown(line["rise"], "{:+.1%}"), *losses, *answers])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def after(study: Study) -> None:
    """Read every finished cell, write lengths.json and print the table."""
    if lines := report(study):
        with replacing(study.out / "lengths.json") as [temporary]:
            temporary.write_text(json.dumps({"trained_at": TRAINED, "window": WINDOW, "lines": lines}, indent=1) + "\n")
        print(text(lines), file=sys.stdout, flush=True)


CLAIM = Claim(
    name="lengths",
    asks=__doc__.partition("\n\n")[0],
    reference="RoPE",
    axis="flops",
    scales={
        "cpu": Scale(("chain",), 8_000, 60, 64, 1, 2048, (0.4e12, 0.8e12, 1.2e12), checked=0),
        "cuda": Scale(
            ("chain",), 40_000, 500, 128, 2, 16_384, (1e14, 2e14, 4e14), checked=0, device="cuda", precision="bfloat16"
        ),
    },
    arms=dict.fromkeys(("RoPE", "xPos"), RATES),
    config=config,
    after=after,
)  # fmt: skip

sets.SETS["chain"] = chain

if __name__ == "__main__":
    main(CLAIM)
