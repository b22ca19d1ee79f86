"""Does training in float8 converge? 4 x 4 sudokus with the blocks' products in float8, emulated, beside bfloat16.

    python -m bench.studies.float8 OUT --minutes 20

The blocks' forward products and those of their inputs' gradients take operands that are rounded to float8 with a scale
a row, as torch's scaled product does on a card: the row's largest number becomes the format's largest. Weights are
rounded where a product takes them. Their gradients, the head and everything between products stay as they are in a
bfloat16 run. The rounded operands are multiplied here in float32, which holds each of their products exactly, and the
sum is rounded to bfloat16 once. Held-out losses and answers are of the averaged weights with bfloat16's products: how
such a model would be run.

The runs are the evidence's (docs/results/evidence.md): AdamW at the settings that its sweep chose, 600 steps, the same
data in the same order for one seed. The rule, fixed before the first run: an arm converges when each of its runs ends
with a number and its mean held-out loss after 600 steps is no higher than the highest of bfloat16's seeds. Pairs of one
seed are shown with Student's interval; with three seeds it can hide a difference.

A stopped study goes on with the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench.evidence import table
from bench.evidence.cell import CellTrainer
from bench.evidence.claim import Claim, Scale, Setting, Study
from hrmcore.ops import sublayers
from hrmcore.train.run_file import TrainConfig


@dataclass(frozen=True)
class Formats:
    """What operands are rounded to: activations and weights, and the gradients of products' results."""

    forward: torch.dtype
    gradient: torch.dtype


# By AdamW's eps, marked: an arm's trainer follows from its run file alone. 1e-8, unmarked, is bfloat16.
FLOAT8 = {
    "float8": (1.5e-8, Formats(torch.float8_e4m3fn, torch.float8_e4m3fn)),
    "float8, gradients e5m2": (1.25e-8, Formats(torch.float8_e4m3fn, torch.float8_e5m2)),
}
STEPS = 600


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (T, K) as float8 holds them, in float32, and each row's scale (T, 1): their product is close to x."""
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(dtype).max
    return (x / scales).to(dtype).float(), scales


def product(rows: Tensor, weight: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype) -> Tensor:
    """rows (T, K) weight (M, K)^T -> (T, M) in the dtype of the rows, both operands rounded to float8 by rows."""
    (left, left_scales), (right, right_scales) = rounded(rows, dtype), rounded(weight, weight_dtype)
    return (torch.mm(left, right.T) * left_scales * right_scales.T).to(rows.dtype)


def gemm(rows: Tensor, weight: Tensor, formats: Formats) -> Tensor:
    """As hrmcore.ops.weights.gemm."""
    return product(rows, weight, formats.forward, formats.forward)


def gemm_rows_backward(grad: Tensor, weight: Tensor, formats: Formats) -> Tensor:
    """As hrmcore.ops.weights.gemm_rows_backward; a scale belongs to a column of the weight, along which it sums."""
    return product(grad, weight.T, formats.gradient, formats.forward)


@contextlib.contextmanager
def blocks_in(formats: Formats) -> Iterator[None]:
    """The blocks' products are in float8 in this context."""
    with contextlib.ExitStack() as patches:
        for ours in (gemm, gemm_rows_backward):
            patches.enter_context(mock.patch.object(sublayers, ours.__name__, partial(ours, formats=formats)))
        yield


class Float8Trainer(CellTrainer):
    """The trainer, whose steps are in float8 where the run file's eps says so; validations never are."""

    def _train_step(self) -> dict[str, float]:
        for eps, formats in FLOAT8.values():
            if self.config.eps == eps:
                with blocks_in(formats):
                    return super()._train_step()
        return super()._train_step()


def config(setting: Setting) -> TrainConfig:
    eps = FLOAT8[setting.arm][0] if setting.arm in FLOAT8 else 1e-8
    rate, b1 = setting.candidate["rate"], setting.candidate["b1"]
    model = setting.scale.model(setting.vocabulary)
    return setting.config(model, optimizer="adamw", learning_rate=rate, betas=(b1, 0.95), eps=eps)


CLAIM = Claim(
    name="float8",
    asks=__doc__.partition("\n\n")[0],
    reference="bfloat16",
    axis="step",
    scales={"cpu": Scale(("sudoku4",), 20_000, 300, 64, 1, 1024, (STEPS,), precision="bfloat16")},
    arms={name: ({"rate": 8e-3, "b1": 0.8},) for name in ("bfloat16", *FLOAT8)},
    config=config,
    trainer=Float8Trainer,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of data, runs and report; made if it is not there")
    parser.add_argument("--minutes", type=float, default=0.0, help="how long it trains (0: only the table)")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    study = Study(CLAIM, CLAIM.scales["cpu"], "sudoku4", arguments.out)
    study.run(deadline)
    print(table.text(study.write()))


if __name__ == "__main__":
    main()
