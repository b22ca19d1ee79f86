"""Does recurrence pay? HRM beside one pass, a looped Transformer and TRM, at equal FLOPs; loss and answers on the way.

    python -m bench.evidence.architectures OUT --hours 8 --device cpu
    python -m bench.evidence.architectures OUT --minutes 10 --device cuda

The first four have equal parameters. "deep, one pass" has HRM's FLOPs a token instead, in layers of their own: it is
what HRM's compute buys without recurrence. Each has the same three rates. What a cheaper arm saves a token it sees more
tokens for; the curves say where one overtakes another.
"""

from __future__ import annotations

from typing import Any

from bench.evidence.claim import RATES, Claim, Scale, Setting, main
from hrmcore.train.run_file import TrainConfig

# Beside HRM's width and layers. Of a token HRM passes 8 visits forward and 5 backward, as many FLOPs as 6 both ways.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "HRM": {"H_cycles": 2, "L_cycles": 3},
    "one pass": {"H_cycles": 1, "L_cycles": 1},
    "deep, one pass": {"H_cycles": 1, "L_cycles": 1, "deeper": 3},
    "looped": {"H_cycles": 4, "L_cycles": 1},
    "TRM": {"H_cycles": 2, "L_cycles": 3, "shared_stacks": True, "deeper": 2},
}


def config(setting: Setting) -> TrainConfig:
    shape = dict(ARCHITECTURES[setting.arm])
    layers = setting.scale.layers * shape.pop("deeper", 1)
    model = setting.scale.model(setting.vocabulary, num_layers_per_stack=layers, **shape)
    return setting.config(model, learning_rate=setting.candidate["rate"])


CLAIM = Claim(
    name="architectures",
    asks=__doc__.partition("\n\n")[0],
    reference="one pass",
    axis="flops",
    scales={
        "cpu": Scale(("sudoku4", "sums", "mazes"), 20_000, 300, 64, 1, 1024, (0.4e12, 0.8e12, 1.6e12)),
        "cuda": Scale(
            ("sudoku9", "mazes", "sums", "iq"), 100_000, 1000, 256, 2, 16_384, (1e15, 2e15, 4e15),
            warmup=100, eval_every=100, checked=500, device="cuda", precision="bfloat16",
        ),
    },
    arms=dict.fromkeys(ARCHITECTURES, RATES),
    config=config,
)  # fmt: skip

if __name__ == "__main__":
    main(CLAIM)
