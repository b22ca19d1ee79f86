"""The training loop: it learns, it resumes bit for bit, its schedules are the designed ones, bad input is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hrmcore.cli import main
from hrmcore.model import HRM
from hrmcore.tokenizer import train_tokenizer
from hrmcore.train import TrainConfig, Trainer, explain, horizon, learning_rate, read_config

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    records = [{"instruction": f"repeat {a} {b}", "response": f"{a} {b}"} for a in WORDS for b in WORDS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    train_tokenizer((r["instruction"] for r in records), tmp_path / "tokenizer", vocab_size=330)
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
train_files = ["{tmp_path}/train.jsonl"]
heldout_files = ["{tmp_path}/train.jsonl"]
tokenizer = "{tmp_path}/tokenizer"
out = "{tmp_path}/out"
steps = 12
batch_tokens = 256
learning_rate = 3e-3
warmup_steps = 2
eval_every = 6
save_every = 4
seed = 7
[model]
hidden_size = 32
intermediate_size = 64
num_layers_per_stack = 1
num_attention_heads = 2
head_dim = 16
max_position_embeddings = 64
""",
        encoding="utf-8",
    )
    return path


def rewrite(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_learns_and_exports(run_file: Path, precision: str) -> None:
    rewrite(run_file, "steps = 12", f'steps = 60\nprecision = "{precision}"')
    config = read_config(run_file)
    Trainer(config).run()
    rows = metrics(Path(config.out))
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["heldout_loss"] < rows[5]["heldout_loss"]
    exported = HRM.from_pretrained(Path(config.out) / "checkpoint")
    assert exported.config.vocab_size == config.model.vocab_size
    assert (Path(config.out) / "checkpoint" / "tokenizer.model").is_file()


def test_a_stopped_run_resumes_bit_for_bit(run_file: Path, tmp_path: Path) -> None:
    config = read_config(run_file)
    whole = Trainer(config)
    whole.run()

    rewrite(run_file, f"{tmp_path}/out", f"{tmp_path}/stopped")
    first = Trainer(read_config(run_file))
    for _ in range(5):
        first._train_step()
    first.save()
    second = Trainer(read_config(run_file))
    assert second.step == 5
    second.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_loss_is_the_mean_over_response_tokens(run_file: Path) -> None:
    """Against logits of single, unpacked sequences and torch's cross-entropy."""
    trainer = Trainer(read_config(run_file))
    batch = next(trainer._batch_stream(skip=0))
    expected = 0.0
    for s in range(len(batch.records)):
        start, stop = int(batch.offsets[s]), int(batch.offsets[s + 1])
        prefix = int(batch.prefix[s])
        logits = trainer.model(batch.ids[start:stop][None], prefix_length=prefix)[0, prefix - 1 :]
        record = batch.records[s]
        sequence = trainer.corpus.tokens[trainer.corpus.offsets[record] : trainer.corpus.offsets[record + 1]]
        targets = torch.from_numpy(sequence[prefix:]).long()
        expected += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    assert trainer.model.loss(batch).item() == pytest.approx(expected, rel=1e-5)


def test_a_short_horizon_leaves_the_embedding_alone(run_file: Path) -> None:
    trainer = Trainer(read_config(run_file))
    before = trainer.model.embed_tokens.weight.detach().clone()
    moved = trainer.model.lm_head.weight.detach().clone()
    assert horizon(trainer.config, 0) == 2
    trainer._train_step()
    assert torch.equal(trainer.model.embed_tokens.weight, before)  # no gradient, so no weight decay either
    assert not torch.equal(trainer.model.lm_head.weight, moved)


def test_schedules(run_file: Path) -> None:
    rewrite(run_file, "steps = 12", "steps = 100")
    config = read_config(rewrite(run_file, "warmup_steps = 2", "warmup_steps = 10"))
    assert learning_rate(config, 0) == pytest.approx(3e-4)
    assert learning_rate(config, 9) == pytest.approx(3e-3)
    assert learning_rate(config, 55) == pytest.approx(1.5e-3)
    assert learning_rate(config, 99) < 3e-6
    assert [horizon(config, step) for step in (0, 6, 7, 13, 14, 19, 20, 99)] == [2, 2, 3, 3, 4, 4, 5, 5]


def test_a_gradient_that_is_not_finite_stops_with_the_records(run_file: Path) -> None:
    trainer = Trainer(read_config(run_file))
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient is not finite; the batch's records are \d+"):
        trainer._train_step()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 12", "steps = 0", "steps must be at least 1, got 0"),
        ("steps = 12", "stepz = 12", "unknown key 'stepz'"),
        ("steps = 12", "", "missing key 'steps'"),
        ("steps = 12", 'steps = "many"', "steps must be of type int, got 'many'"),
        ("steps = 12", "steps = ", "not TOML"),
        ("learning_rate = 3e-3", "learning_rate = -1", "learning_rate must be above 0"),
        ("seed = 7", 'schedule = "triangle"', "schedule must be one of"),
        ("seed = 7", "horizon_first = 1", "2 <= horizon_first"),
        ("hidden_size = 32", "hidden_sise = 32", "unknown key 'hidden_sise'"),
        ("head_dim = 16", "head_dim = 13", "head_dim must be a multiple of 8"),
    ],
)
def test_a_bad_run_file_names_file_and_key(run_file: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{run_file}: .*{message}"):
        read_config(rewrite(run_file, old, new))


def test_a_state_of_another_model_is_refused(run_file: Path) -> None:
    trainer = Trainer(read_config(run_file))
    trainer.save()
    with pytest.raises(ValueError, match=r"state\.safetensors: the state is of another model"):
        Trainer(read_config(rewrite(run_file, "intermediate_size = 64", "intermediate_size = 128")))
    (trainer.out / "state.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"state\.safetensors: not a training state"):
        Trainer(trainer.config)


def test_explain_lists_every_key() -> None:
    text = explain()
    for key in TrainConfig.__dataclass_fields__:
        assert key in text


def test_the_command_trains_and_names_mistakes(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run_file)]) == 0
    assert len(metrics(Path(read_config(run_file).out))) == 12
    capsys.readouterr()
    assert main(["train", str(rewrite(run_file, "steps = 12", "steps = 0"))]) == 2
    assert capsys.readouterr().err == f"hrmcore train: {run_file}: train config: steps must be at least 1, got 0\n"
    assert main(["train", str(run_file.with_name("missing.toml"))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
