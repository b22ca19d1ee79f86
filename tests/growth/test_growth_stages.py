"""`[[grow]]` in a run file: stages come when they should, cost what the planner says and resume bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hrmcore import planner
from hrmcore.checkpoint.training_state import find_states, load_state, state_path
from hrmcore.cli import main
from hrmcore.gpus import GPUS
from hrmcore.growth.files import grow_files
from hrmcore.growth.operators import Growth
from hrmcore.model import HRM
from hrmcore.tokenizer import train_tokenizer
from hrmcore.train.run_file import learning_rate, read_config
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]
STAGES = """
[[grow]]
at_tokens = 600
hidden_size = 48
intermediate_size = 64
warmup_steps = 3
[[grow]]
at_tokens = 1500
num_layers_per_stack = 2
num_attention_heads = 4
warmup_steps = 0
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run file of 12 steps of about 256 tokens; `out` names its run folder."""
    records = [{"instruction": f"repeat {a} {b}", "response": f"{a} {b}"} for a in WORDS for b in WORDS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    train_tokenizer((r["instruction"] for r in records), tmp_path / "tokenizer", vocab_size=330)

    def write(out: str = "out", stages: str = STAGES, model: str = "", keys: str = "") -> Path:
        path = tmp_path / f"{out}.toml"
        path.write_text(
            f"""
train_files = ["{tmp_path}/train.jsonl"]
heldout_files = ["{tmp_path}/train.jsonl"]
tokenizer = "{tmp_path}/tokenizer"
out = "{tmp_path}/{out}"
steps = 12
batch_tokens = 256
learning_rate = 3e-3
warmup_steps = 2
eval_every = 6
save_every = 4
keep = 99
seed = 7
{keys}
[model]
hidden_size = 32
intermediate_size = 48
num_layers_per_stack = 1
num_attention_heads = 2
head_dim = 16
L_cycles = 1
max_position_embeddings = 64
{model}
{stages}
""",
            encoding="utf-8",
        )
        return path

    return write


def metrics(out: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_grows_at_its_token_counts(write: Callable[..., Path]) -> None:
    config = read_config(write())
    trainer = Trainer(config)
    trainer.run()
    rows = metrics(config.out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    grown = [row for row in rows if "grown_parameters" in row]
    before = [rows[int(row["step"]) - 2]["tokens_seen"] for row in grown]
    assert [b - 256 < at <= b for b, at in zip(before, (600, 1500), strict=True)] == [True, True]
    shapes = [config.model.replace(hidden_size=48, intermediate_size=64, embedding_scale=None)]
    shapes.append(shapes[0].replace(num_layers_per_stack=2, num_attention_heads=4))
    assert [row["grown_parameters"] for row in grown] == [planner.parameters(shape) for shape in shapes]
    assert trainer.model.config == shapes[1]
    for row in grown:
        assert abs(row["growth_loss_after"] / row["growth_loss_before"] - 1) <= 1e-5
        # The state before the growth lies there, of the smaller shape.
        _, metadata = load_state(state_path(Path(config.out), int(row["step"]) - 1))
        sizes = json.loads(metadata["model_config"])
        smaller = config.model if row is grown[0] else shapes[0]
        assert (sizes["hidden_size"], sizes["num_layers_per_stack"]) == (
            smaller.hidden_size,
            smaller.num_layers_per_stack,
        )
    assert HRM.from_pretrained(Path(config.out) / "checkpoint").config.hidden_size == 48


def test_the_learning_rate_rises_again(write: Callable[..., Path]) -> None:
    config = read_config(write())
    Trainer(config).run()
    rows = metrics(config.out)
    first, second = (int(row["step"]) - 1 for row in rows if "grown_parameters" in row)
    assert second - first >= 3
    factors = [row["learning_rate"] / learning_rate(config, step) for step, row in enumerate(rows)]
    expected = [1.0] * 12
    expected[first : first + 2] = [1 / 3, 2 / 3]
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["adamatan2", "sophia-g"])
def test_a_run_stopped_anywhere_grows_to_the_same_bits(write: Callable[..., Path], optimizer: str) -> None:
    """Before a growth, right at one, in the middle of mode ramped, after the last."""
    ramped = STAGES.replace("warmup_steps = 3", 'warmup_steps = 3\nmode = "ramped"\nmask_steps = 3')
    keys = f'optimizer = "{optimizer}"\nema = 0.9'
    whole = Trainer(read_config(write("whole", ramped, keys=keys)))
    whole.run()
    stopped = read_config(write("stopped", ramped, keys=keys))
    for count in (2, 1, 1, 2, 4):
        trainer = Trainer(stopped)
        for _ in range(count):
            trainer._train_step()
        trainer.save()
        trainer.close()
    last = Trainer(stopped)
    last.run()
    ours, theirs = (load_state(find_states(trainer.out)[0][1]) for trainer in (last, whole))
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(tensor, theirs[0][name]) for name, tensor in ours[0].items())
    assert ours[1]["model_config"] == theirs[1]["model_config"]
    assert sum("grown_parameters" in row for row in metrics(whole.config.out)) == 2


def test_mode_ramped_ends_with_its_random_entries(write: Callable[..., Path]) -> None:
    """With a learning rate next to nothing, what is left of the growth is what the scalar brought."""
    stages = '[[grow]]\nat_tokens = 600\nhidden_size = 48\nmode = "ramped"\nmask_steps = 3\n'
    path = write(stages=stages, keys='optimizer = "adamw"')
    config = read_config(_edited(path, "learning_rate = 3e-3", "learning_rate = 1e-12"))
    trainer = Trainer(config)
    trainer.run()
    growth = Growth.of(config.model, {"hidden_size": 48}, seed=7, mode="ramped", mask_steps=3)
    torch.manual_seed(7)
    small = HRM(config.model)
    expected = growth.model(small).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.allclose(tensor, expected[name] + growth.ramped_entries(name), atol=1e-6), name


def _edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_a_growth_that_moves_the_loss_stops_the_run(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Growth.factor
    monkeypatch.setattr(Growth, "factor", lambda self, name, power=1: 1.001 * plain(self, name, power))
    trainer = Trainer(read_config(write()))
    with pytest.raises(FloatingPointError, match=r"moved the loss on a fixed batch from .* the run stops"):
        trainer.run()
    assert trainer.model.config == trainer.config.model
    monkeypatch.undo()
    step, _ = find_states(trainer.out)[0]
    assert step == trainer.step
    again = Trainer(trainer.config)  # from the state before the growth
    again.run()
    assert again.model.config.num_layers_per_stack == 2


def test_the_cost_of_the_schedule_is_the_planners(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config(write())
    trainer = Trainer(config)
    trainer.run()
    row = next(row for row in metrics(config.out) if "growth_flops" in row)
    corpus = trainer.corpus
    prompt = float(corpus.prefix.mean())
    record = planner.Record(prompt, float(corpus.lengths.mean()) - prompt)
    first, last = config.model, trainer.model.config
    middle = last.replace(num_layers_per_stack=1, num_attention_heads=2)
    budget = planner.Budget(12 * 256, GPUS["A100"], record=record)
    stages = [planner.Stage(start, "", c) for start, c in ((0, first), (600, middle), (1500, last))]
    planned = planner.plan(stages, budget)
    assert row["growth_flops"] == pytest.approx(planned.flops.total)
    assert row["from_scratch_flops"] == pytest.approx(planned.from_scratch.total)
    assert f"{planned.flops.total / planned.from_scratch.total:.0%} of its last model" in capsys.readouterr().err


def test_a_grown_state_trains_on(write: Callable[..., Path], tmp_path: Path) -> None:
    """`hrmcore grow` on a run folder, then a run file with the larger [model]; mode ramped goes on there."""
    trainer = Trainer(read_config(write("small", "")))
    trainer._train_step()
    trainer.save()
    trainer.close()
    options: dict[str, Any] = {"mode": "ramped", "mask_steps": 4}
    grow_files(tmp_path / "small", tmp_path / "large", {"intermediate_size": 64}, **options)
    path = _edited(write("large", ""), "intermediate_size = 48", "intermediate_size = 64")
    larger = Trainer(read_config(path))
    assert larger.step == 1
    entries = Growth.of(trainer.model.config, {"intermediate_size": 64}, **options).ramped_entries
    name = "L_module.layers.0.down_proj.weight"
    new = [*range(24, 32), *range(56, 64)]  # after each half of the old units
    assert not larger.model.state_dict()[name][:, new].any()
    larger.run()
    learned = larger.model.state_dict()[name][:, new]
    assert torch.corrcoef(torch.stack([learned.flatten(), entries(name)[:, new].flatten()]))[0, 1] > 0.5


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[[grow]]\nhidden_size = 48", r"\[\[grow\]\] 1: missing key 'at_tokens'"),
        ("[[grow]]\nat_tokens = 0\nhidden_size = 48", r"\[\[grow\]\] 1: at_tokens must rise .* got 0"),
        (STAGES.replace("1500", "600"), r"\[\[grow\]\] 2: at_tokens must rise from stage to stage, got 600"),
        ("[[grow]]\nat_tokens = 9\nhidden_sise = 48", r"\[\[grow\]\] 1: unknown key 'hidden_sise'"),
        ("[[grow]]\nat_tokens = 9\nvocab_size = 400", r"\[\[grow\]\] 1: unknown key 'vocab_size'"),
        ("[[grow]]\nat_tokens = 9\nhidden_size = 16", r"\[\[grow\]\] 1: hidden_size would shrink from 32 to 16"),
        ("[[grow]]\nat_tokens = 9", r"\[\[grow\]\] 1: no size differs"),
        ("[[grow]]\nat_tokens = 9\nhidden_size = 48.0", r"\[\[grow\]\] 1: hidden_size must be of type int, got 48\.0"),
        (STAGES + 'mode = "ramped"', r"\[\[grow\]\] 2: mode 'ramped' takes mask_steps"),
        (
            "[[grow]]\nat_tokens = 9\nhidden_size = 48\nwarmup_steps = -1",
            r"\[\[grow\]\] 1: warmup_steps must be at least 0",
        ),
    ],
)
def test_stages_that_cannot_be_are_named(write: Callable[..., Path], stages: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"out\.toml: {message}"):
        read_config(write(stages=stages))


def test_a_stage_after_the_end_is_refused(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write(stages=STAGES.replace("1500", "9999")))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "[[grow]]: at_tokens 9999 comes after the run's end, at most 3072 tokens" in error


def test_stages_behind_a_state_must_stay(write: Callable[..., Path]) -> None:
    Trainer(read_config(write())).run()
    with pytest.raises(ValueError, match=r"has grown 2 times, to a shape that the run file does not reach by then"):
        Trainer(read_config(write(stages=STAGES.replace("num_attention_heads = 4", "num_attention_heads = 8"))))
