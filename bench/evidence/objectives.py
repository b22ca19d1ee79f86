"""Do loss on the response alone and a prefix that is read both ways pay, beside loss on all tokens and causal reading?

    python -m bench.evidence.objectives OUT --hours 8 --device cpu
    python -m bench.evidence.objectives OUT --minutes 10 --device cuda

HRM with three objectives, at equal FLOPs. The held-out loss is that of the responses in every cell. Each arm has the
same three rates.
"""

from __future__ import annotations

from bench.evidence.claim import RATES, Claim, Scale, Setting, main
from hrmcore.train.run_file import TrainConfig

# Whether the instruction is read both ways, and which tokens carry loss.
OBJECTIVES = {
    "response, PrefixLM": (True, "response"),
    "response, causal": (False, "response"),
    "all tokens, causal": (False, "all"),
}


def config(setting: Setting) -> TrainConfig:
    both_ways, objective = OBJECTIVES[setting.arm]
    model = setting.scale.model(setting.vocabulary, prefix_lm=both_ways)
    return setting.config(model, objective=objective, learning_rate=setting.candidate["rate"])


CLAIM = Claim(
    name="objectives",
    asks=__doc__.partition("\n\n")[0],
    reference="response, PrefixLM",
    axis="flops",
    scales={
        "cpu": Scale(("sudoku4", "sums", "mazes"), 20_000, 300, 64, 1, 1024, (0.4e12, 0.8e12, 1.3e12)),
        "cuda": Scale(
            ("sudoku9", "mazes", "iq"), 100_000, 1000, 256, 2, 16_384, (1e15, 2e15, 4e15),
            warmup=100, eval_every=100, checked=500, device="cuda", precision="bfloat16",
        ),
    },
    arms=dict.fromkeys(OBJECTIVES, RATES),
    config=config,
)  # fmt: skip

if __name__ == "__main__":
    main(CLAIM)
