"""`device = "cuda"` of a run: the emulated kernels beside the CPU's, every tensor on its device, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.elsewhere import DEVICE, another_device, inner_of
from support.emulator import emulated_cuda
from support.runs import write_run

from hrmcore import operands, optim
from hrmcore.checkpoint.training_state import find_states, load_state
from hrmcore.cli import main
from hrmcore.distributed import world as distributed
from hrmcore.tokenizer import train_tokenizer
from hrmcore.train import curvature
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread", "no_peak")]

RECORDS = [{"instruction": f"repeat {word}", "response": word} for word in ("alpha", "beta", "gamma", "delta")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((record["instruction"] for record in RECORDS), folder, vocab_size=290)
    return folder


MODEL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 1}


def run_file(folder: Path, tokenizer: Path, **keys: Any) -> Path:
    few = {"steps": 3, "batch_tokens": 48, "warmup_steps": 1, "save_every": 2, "ema": 0.9}
    heldout = [str(folder / "train.jsonl")]
    return write_run(folder, RECORDS, tokenizer, MODEL, **few | {"heldout_files": heldout} | keys)


def figures(
    folder: Path, names: tuple[str, ...] = ("loss", "grad_norm", "heldout_loss", "heldout_exact")
) -> list[float]:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in names if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamatan2", "sophia-g"])
def test_the_emulated_kernels_train_as_the_cpu(optimizer: str, tmp_path: Path, tokenizer: Path) -> None:
    """Losses, gradients' norms, held-out losses and answers, the state and the averaged weights after three steps."""
    keys = {"optimizer": optimizer} | ({"curvature_every": 2} if optimizer == "sophia-g" else {})
    cpu, cuda = (run_file(tmp_path / name, tokenizer, **keys) for name in ("cpu", "cuda"))
    Trainer(read_config(cpu)).run()
    with emulated_cuda():
        Trainer(read_config(cuda)).run()
    assert len(figures(cpu.parent)) == 3 * 2 + 2
    assert figures(cuda.parent) == pytest.approx(figures(cpu.parent), rel=1e-5)
    states = [load_state(find_states(path.parent / "out")[0][1])[0] for path in (cpu, cuda)]
    assert states[0].keys() == states[1].keys()
    for name, expected in states[0].items():
        assert (states[1][name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("optimizer", ["adamw", "sophia-g", "sophia-h"])
def test_every_tensor_is_on_the_device(
    optimizer: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run, resumed and grown, on a device that is none: what would mix it with the CPU fails; the CPU's bits."""
    keys = {"optimizer": optimizer} | ({"curvature_every": 1} if optimizer != "adamw" else {})
    stages = "[[grow]]\nat_tokens = 30\nintermediate_size = 48\n"
    files = [run_file(tmp_path / name, tokenizer, stages=stages, **keys) for name in ("cpu", "elsewhere")]
    Trainer(read_config(files[0])).run()
    draw = curvature.generator_of
    with monkeypatch.context() as patch, another_device():
        patch.setattr(distributed, "_device_of_rank", lambda device: DEVICE)
        patch.setattr(curvature, "generator_of", lambda seed, step, rank=0, device=None: draw(seed, step, rank))
        patch.setattr(optim, "check_tensor", lambda what, number, tensor: inner_of(tensor))
        patch.setattr(operands, "to_dlpack", lambda tensor: torch.utils.dlpack.to_dlpack(inner_of(tensor)))
        interrupted = Trainer(read_config(files[1]))
        interrupted._train_step()
        assert "grown_parameters" in interrupted._train_step()
        interrupted.save()
        interrupted.close()
        Trainer(read_config(files[1])).run()
    assert figures(files[1].parent) == figures(files[0].parent)[-len(figures(files[1].parent)) :]
    ours, theirs = (load_state(find_states(path.parent / "out")[0][1])[0] for path in files)
    assert ours["model.L_module.layers.0.gate_up_proj.weight"].shape == (2 * 48, 16)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "sophia-g"])
@pytest.mark.parametrize("position_encoding", ["rope", "xpos"])
def test_a_step_waits_for_the_device_once(
    optimizer: str, position_encoding: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its loss and norm together, however many batches; Sophia's for its count, too, and for a sample's fault."""
    keys = {"optimizer": optimizer, "accumulate": 3} | ({"curvature_every": 2} if optimizer != "adamw" else {})
    xpos = {"position_encoding": "xpos", "xpos_scale_base": 64} if position_encoding == "xpos" else {}
    path = write_run(tmp_path / "run", RECORDS, tokenizer, MODEL | xpos, **{"steps": 3, "batch_tokens": 48} | keys)
    draw = curvature.generator_of
    with monkeypatch.context() as patch, another_device() as waits:
        patch.setattr(distributed, "_device_of_rank", lambda device: DEVICE)
        patch.setattr(curvature, "generator_of", lambda seed, step, rank=0, device=None: draw(seed, step, rank))
        patch.setattr(optim, "check_tensor", lambda what, number, tensor: inner_of(tensor))
        patch.setattr(operands, "to_dlpack", lambda tensor: torch.utils.dlpack.to_dlpack(inner_of(tensor)))
        trainer = Trainer(read_config(path))
        waits.clear()
        trainer._train_step()
        first = len(waits)
        trainer._train_step()
        trainer.close()
    assert (first, len(waits) - first) == ((1, 1) if optimizer == "adamw" else (3, 2)), waits


def test_a_device_that_is_not_there(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path / "run", tokenizer, device="cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["train", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("is built without CUDA; use device 'cpu'")
    assert not (path.parent / "out").exists()
    monkeypatch.setattr(distributed, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert main(["train", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "process 2 of this machine has no GPU, for there are 2" in line


def test_each_process_of_a_machine_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(distributed, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.World("cuda").device == torch.device("cuda", 1)
    assert current == [1]


def test_a_run_takes_the_gpu_that_it_names(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(distributed, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    config = read_config(run_file(tmp_path / "run", tokenizer, device="cuda:1", cuda_graphs=True))
    assert distributed.World(config.device).device == torch.device("cuda", 1)
    assert current == [1]
    with pytest.raises(ValueError, match=r"device 'cuda:2': this machine has 2 GPUs, numbered from 0"):
        distributed.World("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"device 'cuda:1': each of several processes takes a GPU of its own"):
        distributed.World("cuda:1")


def test_an_unknown_device(tmp_path: Path, tokenizer: Path) -> None:
    path = run_file(tmp_path / "run", tokenizer, device="gpu")
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"):
        read_config(path)
