"""Does growing pay? A run that begins small and grows once, beside the last size from scratch, at equal FLOPs.

    python -m bench.evidence.growth OUT --hours 8 --device cpu
    python -m bench.evidence.growth OUT --minutes 10 --device cuda

It grows in width from half (FFN and heads with it), or in depth from half, after a share of its tokens; the rate rises
again after it. What a cheap beginning saves is spent on more tokens. Each arm has the same three rates. When to grow
follows from how long the run is, so a rung is a run of its own here.
"""

from __future__ import annotations

from typing import Any

from bench.evidence.claim import RATES, Claim, Scale, Setting, main
from hrmcore.data.store import open_store
from hrmcore.growth.stages import GrowStage
from hrmcore.train.proposal import flops_a_token
from hrmcore.train.run_file import TrainConfig

# What is half at first, and after which share of the tokens it grows.
ARMS = {
    "scratch": ("", 0.0),
    "width at 0.25": ("width", 0.25),
    "width at 0.1": ("width", 0.1),
    "width at 0.5": ("width", 0.5),
    "depth at 0.25": ("depth", 0.25),
}


def config(setting: Setting) -> TrainConfig:
    half, share = ARMS[setting.arm]
    scale, rate = setting.scale, setting.candidate["rate"]
    last = scale.model(setting.vocabulary)
    if not half:
        return setting.config(last, learning_rate=rate)
    smaller: dict[str, Any] = {"num_layers_per_stack": scale.layers // 2}
    if half == "width":
        smaller = {"hidden_size": scale.width // 2}
    first = scale.model(setting.vocabulary, **smaller)
    corpus = open_store(setting.data / "train").corpus
    tokens = tokens_for(setting.target, share, flops_a_token(first, corpus), flops_a_token(last, corpus))
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_layers_per_stack")
    grown = {name: getattr(last, name) for name in sizes if getattr(last, name) != getattr(first, name)}
    stage = GrowStage(at_tokens=round(share * tokens), warmup_steps=scale.warmup, **grown)
    return setting.config(first, learning_rate=rate, grow=(stage,))


def tokens_for(flops: float, share: float, small: float, large: float) -> float:
    """How many tokens the FLOPs pay for, of which a share costs `small` a token and the rest `large`."""
    return flops / (share * small + (1 - share) * large)


CLAIM = Claim(
    name="growth",
    asks=__doc__.partition("\n\n")[0],
    reference="scratch",
    axis="flops",
    scales={
        "cpu": Scale(("sudoku4", "sums"), 20_000, 300, 64, 2, 1024, (0.4e12, 0.8e12, 1.6e12)),
        "cuda": Scale(
            ("mazes", "sudoku9", "iq"), 100_000, 1000, 256, 4, 16_384, (1e15, 2e15, 4e15),
            warmup=100, eval_every=100, checked=500, device="cuda", precision="bfloat16",
        ),
    },
    arms=dict.fromkeys(ARMS, RATES),
    config=config,
)  # fmt: skip

if __name__ == "__main__":
    main(CLAIM)
