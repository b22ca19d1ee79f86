"""Does curvature pay? Sophia-G and Sophia-H beside AdamW, AdamAtan2 and Muon, by steps and by FLOPs.

    python -m bench.evidence.optimizers OUT --hours 8 --device cpu
    python -m bench.evidence.optimizers OUT --minutes 10 --device cuda

Each has three rates, each twice the one before, with its own first momentum and with 0.8. FLOPs count what a step costs
beside the model: a curvature sample of G is one more forward and backward, of H seven thirds of one (the gradient is
differentiated once more), Muon orthogonalises every matrix of the stacks.
"""

from __future__ import annotations

import itertools
from typing import Any

from bench.evidence.cell import CellTrainer
from bench.evidence.claim import Candidate, Claim, Scale, Setting, main
from bench.evidence.muon import MuonBeside, flops
from hrmcore.train.run_file import TrainConfig

# The first rate is where earlier runs found the best, or what it is matched to.
RATES = {
    "adamw": (4e-3, 2e-3, 8e-3),
    "sophia-g": (1e-3, 5e-4, 2e-3),
    "muon": (4e-3, 2e-3, 8e-3),
    "adamatan2": (4e-3, 2e-3, 8e-3),
    "sophia-h": (1e-3, 5e-4, 2e-3),
}
MOMENTUM = {"adamw": 0.9, "sophia-g": 0.965, "muon": 0.95, "adamatan2": 0.9, "sophia-h": 0.965}
SHORT = 0.8
SECOND = {"adamw": 0.95, "sophia-g": 0.99, "adamatan2": 0.95, "sophia-h": 0.99}
# Forward and backward passes that a sample of the curvature costs: backward is two forwards, and twice that again.
SAMPLES = {"sophia-g": 1.0, "sophia-h": 7 / 3}


def grid(optimizer: str) -> tuple[Candidate, ...]:
    momenta = (MOMENTUM[optimizer], SHORT)
    return tuple({"rate": rate, "b1": b1} for rate, b1 in itertools.product(RATES[optimizer], momenta))


class OptimizerTrainer(CellTrainer):
    """The trainer, with Muon where a run file's eps says so: a run file has no name for it."""

    def _new_optimizer(self, config: TrainConfig) -> Any:
        if config.eps != MUON_EPS:
            return super()._new_optimizer(config)
        return MuonBeside(self.model, config.learning_rate, config.betas[0], config.weight_decay, config.ema)


MUON_EPS = 1.5e-8  # AdamW's, marked: no other cell has it, and folder and trainer follow from the run file alone


def config(setting: Setting) -> TrainConfig:
    rate, b1 = setting.candidate["rate"], setting.candidate["b1"]
    model = setting.scale.model(setting.vocabulary)
    if setting.arm == "muon":
        return setting.config(model, optimizer="adamw", eps=MUON_EPS, learning_rate=rate, betas=(b1, 0.95))
    betas = (b1, SECOND[setting.arm])
    return setting.config(model, optimizer=setting.arm, learning_rate=rate, betas=betas)


def cost(config: TrainConfig, row: dict[str, float]) -> float:
    """FLOPs of a step beside the model's."""
    if config.eps == MUON_EPS:
        return flops(config.model)
    if config.curvature_every is None:
        return 0.0
    return SAMPLES[config.optimizer] * row["flops"] * ((int(row["step"]) - 1) % config.curvature_every == 0)


CLAIM = Claim(
    name="optimizers",
    asks=__doc__.partition("\n\n")[0],
    reference="adamw",
    axis="step",
    scales={
        "cpu": Scale(("sudoku4", "sums"), 20_000, 300, 64, 1, 1024, (150, 300, 450, 600)),
        "cuda": Scale(
            ("mazes", "iq"), 100_000, 1000, 256, 2, 16_384, (300, 600, 900, 1500),
            warmup=100, eval_every=100, checked=500, device="cuda", precision="bfloat16",
        ),
    },
    arms={name: grid(name) for name in RATES},
    config=config,
    cost=cost,
    trainer=OptimizerTrainer,
)  # fmt: skip

if __name__ == "__main__":
    main(CLAIM)
