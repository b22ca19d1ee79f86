"""Where Sophia-G's steps go: its clipping (rho), how often and over how many batches its curvature is sampled, larger
batches, and its momentum, each beside AdamW at the same batch. Model, data, runs and curves
are those of bench/studies/convergence.py.

    python -m bench.studies.sophia runs/out/convergence

One seed and a rate or two for most settings: this looks for what is worth a study, it does not decide one. Needs the
extras `demo` and `bench`. The last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from bench.studies.convergence import Run, curve_of, final, provide_data

STEPS, EVAL_EVERY = 300, 25
SMALL, LARGE = 2048, 8192  # tokens of a batch
VARIANTS = (
    Run("adamw", 2e-3, 0, STEPS, SMALL),
    Run("sophia-g", 5e-4, 0, STEPS, SMALL),
    Run("sophia-g", 1e-3, 0, STEPS, SMALL, rho=1),
    Run("sophia-g", 1e-3, 0, STEPS, SMALL, rho=10),
    Run("sophia-g", 4e-3, 0, STEPS, SMALL, rho=10),
    Run("sophia-g", 4e-3, 0, STEPS, SMALL, rho=100),
    Run("sophia-g", 5e-4, 0, STEPS, SMALL, curvature_batches=8),
    Run("sophia-g", 1e-3, 0, STEPS, SMALL, rho=1, curvature_batches=8),
    Run("sophia-g", 5e-4, 0, STEPS, SMALL, curvature_every=1),
    Run("adamw", 2e-3, 0, STEPS // 2, LARGE),
    Run("sophia-g", 5e-4, 0, STEPS // 2, LARGE),
    Run("sophia-g", 1e-3, 0, STEPS // 2, LARGE, rho=1),
    Run("adamw", 2e-3, 0, STEPS, SMALL, betas=(0.965, 0.99)),
    Run("adamw", 2e-3, 0, STEPS, SMALL, betas=(0.9, 0.99)),
    Run("adamw", 2e-3, 0, STEPS, SMALL, betas=(0.8, 0.95)),
    Run("adamw", 2e-3, 0, STEPS, SMALL, betas=(0.6, 0.95)),
    *(Run("sophia-g", 5e-4, 0, STEPS, SMALL, betas=(b1, 0.99)) for b1 in (0.9, 0.8, 0.6)),
    *(Run("sophia-g", 1e-3, 0, STEPS, SMALL, betas=(b1, 0.99)) for b1 in (0.9, 0.8)),
    Run("sophia-g", 1e-3, 0, STEPS, SMALL, rho=1, betas=(0.9, 0.99)),
    Run("sophia-g", 5e-4, 0, STEPS // 2, LARGE, betas=(0.8, 0.99)),
    *(Run("adamw", 2e-3, seed, 2 * STEPS, SMALL, betas=(0.8, 0.95)) for seed in range(3)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=40_000, help="to train on (40000)")
    parser.add_argument("--nice", type=int, default=10, help="lowers this process's priority (10)")
    arguments = parser.parse_args()
    os.nice(arguments.nice)
    provide_data(arguments.out, arguments.records)
    lines = []
    print(
        f"{'optimizer':<10}{'batch':>6}{'steps':>6}{'rate':>8}{'b1':>6}{'b2':>6}{'rho':>6}{'k':>4}{'c':>3}{'loss':>8}{'clipped':>9}"
    )
    for run in VARIANTS:
        curve = curve_of(run, arguments.out, EVAL_EVERY)
        clipped = curve["clipped_fraction"][-1]
        sophia = run.optimizer.startswith("sophia")
        settings = (
            f"{run.rho:>6g}{run.curvature_every:>4}{run.curvature_batches:>3}{final(curve):>8.3f}{clipped:>9.0%}"
            if sophia
            else f"{'':>13}{final(curve):>8.3f}"
        )
        betas = f"{'':>12}" if run.betas is None else "{:>6g}{:>6g}".format(*run.betas)
        print(f"{run.optimizer:<10}{run.batch_tokens:>6}{run.steps:>6}{run.rate:>8g}{betas}{settings}", flush=True)
        lines.append({"run": run.name, "final": final(curve), "clipped_fraction": clipped})
    print(json.dumps({"lines": lines}))


if __name__ == "__main__":
    main()
