"""Sharded training (FSDP2) in two gloo processes: the curve of one, half of its memory, states for any number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import needs_shard_files
from support.two_ranks import ENVIRONMENT, STEPS, Ranks, check_curve, go_on_from, rows, write_run

from hrmcore import planner
from hrmcore.checkpoint.training_state import find_states, load_state, state_path
from hrmcore.cli import main
from hrmcore.data.packing import BatchStream
from hrmcore.model import HRM
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("no_peak"), needs_shard_files]


def train_in_two(ranks: Ranks, file: Path) -> None:
    answers = ranks.train(file)
    assert [status for status, _ in answers] == [0, 0], answers


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one_and_any_number_goes_on_from_any(
    tmp_path: Path, tokenizer: Path, ranks: Ranks
) -> None:
    """Validated every 7 steps on the averaged weights: what was gathered for that must not be used in the next step."""
    keys = {"eval_every": 7, "keep_every": 20, "heldout_files": [str(tmp_path / "alone" / "train.jsonl")]}
    alone = read_config(write_run(tmp_path / "alone", tokenizer, **keys))
    Trainer(alone).run()
    assert rows(alone)[-1]["loss"] < 0.7 * rows(alone)[0]["loss"]

    file = write_run(tmp_path / "two", tokenizer, parallel="sharded", **keys)
    train_in_two(ranks, file)
    two = read_config(file)
    check_curve(two, alone)
    validated = [(row["heldout_loss"], row["heldout_exact"]) for row in rows(two) if "heldout_loss" in row]
    expected = [(row["heldout_loss"], row["heldout_exact"]) for row in rows(alone) if "heldout_loss" in row]
    assert len(validated) == 8
    assert validated == [(pytest.approx(loss, rel=1e-5), exact) for loss, exact in expected]
    exported = HRM.from_pretrained(Path(two.out) / "checkpoint").state_dict()
    for name, weight in HRM.from_pretrained(Path(alone.out) / "checkpoint").state_dict().items():
        torch.testing.assert_close(exported[name], weight, rtol=2**-7, atol=1e-4)  # bfloat16

    # Weights, two moments and the average are float32; a step count for each tensor and z_L_init are on every rank.
    whole = 16 * planner.parameters(two.model)
    assert all(0.5 * whole <= held < 0.51 * whole + 1024 for held in ranks.held), (ranks.held, whole)
    assert [path.name for _, path in find_states(Path(two.out))] == ["step-00000050", "step-00000040", "step-00000020"]
    sizes = sorted(path.stat().st_size for path in find_states(Path(two.out))[0][1].glob("*.safetensors"))
    assert len(sizes) == 2
    assert sizes[0] > 0.45 * sum(sizes)

    one = read_config(write_run(tmp_path / "one", tokenizer, parallel="sharded", **keys))
    go_on_from(two, 20, one)
    Trainer(one).run()
    check_curve(one, alone, first=21)

    for name, source, parallel in (("two again", one, "sharded"), ("of a file", alone, "sharded")):
        file = write_run(tmp_path / name, tokenizer, parallel=parallel)
        go_on_from(source, 40, read_config(file))
        train_in_two(ranks, file)
        check_curve(read_config(file), alone, first=41)

    unsharded = read_config(write_run(tmp_path / "unsharded", tokenizer))
    go_on_from(two, 40, unsharded)
    Trainer(unsharded).run()
    check_curve(unsharded, alone, first=41)


def test_a_rank_without_a_record_takes_part(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    """Batches of so few tokens that some hold a single record; and the embedding, whose gradient is None at K = 2."""
    keys = {"steps": 8, "accumulate": 2, "batch_tokens": 16, "horizon_fraction": 1.0}
    alone = read_config(write_run(tmp_path / "alone", tokenizer, **keys))
    trainer = Trainer(alone)
    stream = BatchStream(trainer.corpus, alone.batch_tokens, alone.seed)
    assert 1 in [len(next(stream).records) for _ in range(alone.steps)]
    trainer.run()
    file = write_run(tmp_path / "two", tokenizer, parallel="sharded", **keys)
    train_in_two(ranks, file)
    check_curve(read_config(file), alone)


def test_sophia_g_samples_and_steps_as_two_unsharded_ranks_do(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    keys = {"optimizer": "sophia-g", "learning_rate": 1e-3, "curvature_every": 2, "steps": 8}
    configs = []
    for parallel in ("data", "sharded"):
        file = write_run(tmp_path / parallel, tokenizer, parallel=parallel, **keys)
        train_in_two(ranks, file)
        configs.append(read_config(file))
    check_curve(configs[1], configs[0])
    whole, sharded = ([row["clipped_fraction"] for row in rows(config)] for config in configs)
    assert sharded == pytest.approx(whole, abs=1e-3)
    assert 0 < sharded[-1] < 1
    theirs, ours = (load_state(find_states(Path(config.out))[0][1])[0] for config in configs)
    for name, tensor in theirs.items():
        if ".hessian." in name:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


ONE_RANK_OVERFLOWS = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from hrmcore.optim import Sophia
mesh = init_device_mesh("cpu", (2,))
p = torch.nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
sophia = Sophia([p])
for fourth in (2.0, float("inf")):
    p.grad = distribute_tensor(torch.tensor([2.0, 2.0, 2.0, fourth, 2.0, 2.0]), mesh, [Shard(0)])
    try:
        sophia.update_hessian()
    except FloatingPointError as error:
        print(error)
print(sophia.state[p]["hessian"].to_local().tolist())
"""


@pytest.mark.slow
def test_no_rank_takes_a_curvature_sample_that_another_refuses() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, "--tee", "1", sys.executable, "-c", ONE_RANK_OVERFLOWS]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = sorted(line.split("]:", 1)[-1] for line in done.stdout.splitlines())
    held = str((torch.full((3,), 4.0) * (1 - 0.99)).tolist())
    assert said == sorted(
        [
            "the curvature sample is not finite in another rank's shards",
            "the curvature sample is not finite in parameter 0",
            *[held] * 2,
        ]
    )


def test_bfloat16_is_gathered_and_rounds_as_it_does_alone(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    keys = {"precision": "bfloat16", "steps": 8}
    alone = read_config(write_run(tmp_path / "alone", tokenizer, **keys))
    Trainer(alone).run()
    file = write_run(tmp_path / "two", tokenizer, parallel="sharded", **keys)
    train_in_two(ranks, file)
    two = read_config(file)
    for ours, theirs in zip(rows(two), rows(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    state = load_state(find_states(Path(two.out))[0][1])[0]
    weight = state["model.H_module.layers.0.down_proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())  # the weights themselves are float32


def test_a_rank_killed_while_a_state_is_written_costs_only_that_state(tmp_path: Path, tokenizer: Path) -> None:
    keys = {"steps": 8, "save_every": 2, "keep": 3}
    alone = read_config(write_run(tmp_path / "alone", tokenizer, **keys))
    Trainer(alone).run()
    file = write_run(tmp_path / "two", tokenizer, parallel="sharded", **keys)
    out = Path(read_config(file).out)
    ranks = Ranks()
    ranks.begin(file, dies=3)
    status, errors = ranks.answer_of(1)
    ranks.close()
    assert status == 2
    assert "another process of this run has ended" in errors
    assert [step for step, _ in find_states(out)] == [4, 2]
    assert (out / "states" / ".writing").is_dir()
    one = read_config(file)
    Trainer(one).run()
    check_curve(one, alone)
    assert not (out / "states" / ".writing").exists()


@pytest.mark.slow
def test_a_sharded_run_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, tokenizer: Path
) -> None:
    """One process; a state at every step, a fifth of the kills at a call of fsync or rename in the writing of one."""
    file = write_run(tmp_path / "run", tokenizer, parallel="sharded", steps=12, save_every=1)
    command = [sys.executable, str(Path(__file__).parents[1] / "soak" / "killing.py"), str(file), "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 16
    assert report["while_writing"] >= 1
    assert report["different"] == 0


def test_a_damaged_newest_state_is_set_aside_aloud(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"steps": 6, "save_every": 2, "keep": 3, "heldout_files": []}
    file = write_run(tmp_path / "run", tokenizer, parallel="sharded", **keys)
    config = read_config(file)
    Trainer(config).run()
    expected, curve = load_state(find_states(Path(config.out))[0][1])[0], rows(config)
    (shard,) = state_path(Path(config.out), 6, sharded=True).glob("*.safetensors")
    contents = bytearray(shard.read_bytes())
    contents[-100] ^= 1
    shard.write_bytes(contents)
    state_path(Path(config.out), 4, sharded=True).joinpath("state.json").unlink()
    capsys.readouterr()
    Trainer(config).run()
    said = capsys.readouterr().err
    assert "damaged, its checksum is not the one that was written; set aside as step-00000006.damaged" in said
    assert "falling back from step 4 to the state before" in said
    found = load_state(find_states(Path(config.out))[0][1])[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [row["loss"] for row in rows(config)] == [row["loss"] for row in curve]


def test_a_sharded_state_grows_and_is_started_from_as_a_file_is(tmp_path: Path, tokenizer: Path) -> None:
    keys = {"steps": 3, "heldout_files": []}
    grown, started = [], []
    for parallel in ("data", "sharded"):
        config = read_config(write_run(tmp_path / parallel, tokenizer, parallel=parallel, **keys))
        Trainer(config).run()
        out = tmp_path / f"grown-{parallel}"
        assert main(["grow", config.out, str(out), "--hidden-size", "64", "--seed", "5"]) == 0
        grown.append(load_state(find_states(out)[0][1])[0])
        text = write_run(tmp_path / f"{parallel} tuned", tokenizer, **keys).read_text()
        tuned = tmp_path / "tuned.toml"
        source = find_states(Path(config.out))[0][1]
        tuned.write_text(text[: text.index("[model]")] + f"init_from = {json.dumps(str(source))}\n")
        trainer = Trainer(read_config(tuned))
        trainer.close()
        started.append(trainer.model.state_dict())
    for ours, theirs in (grown[::-1], started[::-1]):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("keys", "tables", "message"),
    [
        ({"parallel": "fsdp"}, "", r"parallel must be one of \('data', 'sharded'\), got 'fsdp'"),
        ({"parallel": "sharded", "optimizer": "sophia-h"}, "", "sophia-h works on whole parameters; set parallel"),
        ({"parallel": "sharded"}, "[[grow]]\nat_tokens = 9\nhidden_size = 64\n", r"\[\[grow\]\] works on whole"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    tmp_path: Path, tokenizer: Path, keys: dict[str, object], tables: str, message: str
) -> None:
    file = write_run(tmp_path / "run", tokenizer, **keys)
    with file.open("a") as text:
        text.write(tables)
    with pytest.raises(ValueError, match=message):
        read_config(file)


def test_one_process_shards_nothing(tmp_path: Path, tokenizer: Path) -> None:
    config = read_config(write_run(tmp_path / "run", tokenizer, parallel="sharded", steps=STEPS))
    trainer = Trainer(config)
    assert type(trainer.model) is HRM
    trainer.close()


@pytest.mark.slow
def test_visits_that_are_computed_again_find_gathered_weights(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    """The same bits as without: each rank gathers and reduces as before."""
    losses = []
    for recompute in ("sublayer", "visit", "none"):
        keys = {"steps": 4, "horizon_fraction": 0.0, "parallel": "sharded", "recompute": recompute}
        file = write_run(tmp_path / recompute, tokenizer, **keys)
        train_in_two(ranks, file)
        losses.append([(row["loss"], row["grad_norm"]) for row in rows(read_config(file))])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1] == losses[2]
