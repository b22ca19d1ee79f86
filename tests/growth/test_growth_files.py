"""`hrmcore grow`: checkpoints and training states from file to file, in the memory of one layer, sources untouched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_config, shard, split_form
from support.rounding import reordering
from torch import Tensor

from hrmcore import optim
from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.checkpoint.training_state import load_state, save_state, state_path
from hrmcore.cli import main
from hrmcore.config import HRMConfig
from hrmcore.growth.files import grow_files
from hrmcore.growth.operators import Growth, growth_under_way
from hrmcore.model import HRM
from hrmcore.tokenizer import TOKENIZER_FILES, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 48, "num_layers_per_stack": 2, "intermediate_size": 64, "num_attention_heads": 4}
ARGUMENTS = ["--hidden-size", "48", "--layers", "2", "--ffn", "64", "--heads", "4"]


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file of a folder and its checksum."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def difference(ours: HRM, theirs: HRM) -> float:
    ids = torch.arange(24).view(2, 12) + 40
    with torch.no_grad():
        a, b = (model(ids, prefix_length=5)[..., : theirs.config.vocab_size] for model in (ours, theirs))
    return float((a - b).abs().max() / b.abs().max())


def copy_of(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def as_it_is(folder: Path) -> None:
    pass


def as_split(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    split_form(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("form", [as_it_is, as_split, shard], ids=["single", "split", "sharded"])
def test_a_checkpoint_grows_with_its_tokenizer(checkpoint: Path, tmp_path: Path, form: Callable[[Path], None]) -> None:
    source = copy_of(checkpoint, tmp_path / "source")
    form(source)
    before = bytes_of(source)
    assert main(["grow", str(source), str(tmp_path / "out"), *ARGUMENTS, "--vocab-size", "310"]) == 0
    assert bytes_of(source) == before
    small, large = HRM.from_pretrained(source), HRM.from_pretrained(tmp_path / "out")
    assert {key: large.config.to_dict()[key] for key in SIZES} == SIZES
    assert difference(large, small) <= reordering(large.config)
    expected = Growth.of(small.config, SIZES | {"vocab_size": 310}).model(small)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in large.state_dict().items())
    assert Tokenizer.load(tmp_path / "out").encode("what is 3") == Tokenizer.load(source).encode("what is 3")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("source", "out")]


def test_a_checkpoint_without_tokenizer_grows(checkpoint: Path, tmp_path: Path) -> None:
    source = copy_of(checkpoint, tmp_path / "source")
    for name in TOKENIZER_FILES:
        (source / name).unlink(missing_ok=True)
    grow_files(source, tmp_path / "out", {"intermediate_size": 64})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    large = HRM.from_pretrained(tmp_path / "out")
    assert difference(large, HRM.from_pretrained(source)) <= reordering(large.config)


@pytest.mark.parametrize(("width", "stored"), [(128, torch.bfloat16), (48, torch.float32)])
def test_the_type_stays_where_growing_rounds_nothing(
    checkpoint: Path, tmp_path: Path, width: int, stored: torch.dtype
) -> None:
    model = HRM.from_pretrained(checkpoint)
    save_model(model, tmp_path / "source", dtype=torch.bfloat16)
    grow_files(tmp_path / "source", tmp_path / "out", {"hidden_size": width})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {stored}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    large, rounded = HRM.from_pretrained(tmp_path / "out"), HRM.from_pretrained(tmp_path / "source")
    assert difference(large, rounded) <= reordering(large.config)


# Training states

KINDS: dict[str, Callable[..., Any]] = {
    "adamw": optim.AdamW,
    "adamatan2": optim.AdamAtan2,
    "sophia-g": optim.Sophia,
    "sophia-h": lambda params, **options: optim.Sophia(params, variant="H", **options),
}


def trained(name: str, **constants: Any) -> tuple[HRM, Any]:
    """A small model and its optimizer after two steps of random gradients, the head frozen."""
    torch.manual_seed(1)
    model = HRM(
        HRMConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_layers_per_stack=1,
            num_attention_heads=2,
            head_dim=16,
            **constants,
        )
    )
    model.lm_head.requires_grad_(False)
    optimizer = KINDS[name](model.parameters(), ema=0.9)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        if name == "sophia-g":
            optimizer.update_hessian()
        optimizer.step(**({"batch_tokens": 9} if name == "sophia-g" else {}))
    return model, optimizer


def tensors_of(model: HRM, optimizer: Any) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def saved(folder: Path, name: str, **changes: str) -> Path:
    model, optimizer = trained(name)
    config = json.dumps(model.config.to_dict())
    metadata = {"step": "7", "tokens": "900", "optimizer": name, "model_config": config, "rng": "{}"} | changes
    save_state(state_path(folder, 7), tensors_of(model, optimizer), metadata)
    return folder


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_state_grows_as_model_and_optimizer_do(tmp_path: Path, name: str, interleaved: bool) -> None:
    source = saved(tmp_path / "run", name)
    before = bytes_of(source)
    flags = ["--interleaved"] if interleaved else []
    assert main(["grow", str(source), str(tmp_path / "out"), *ARGUMENTS, "--layers", "3", "--seed", "5", *flags]) == 0
    assert bytes_of(source) == before
    tensors, metadata = load_state(state_path(tmp_path / "out", 7))
    model, optimizer = trained(name)
    growth = Growth.of(model.config, SIZES | {"num_layers_per_stack": 3}, seed=5, interleaved=interleaved)
    bigger = growth.model(model)
    expected = tensors_of(bigger, growth.optimizer(optimizer, model, bigger))
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor), key
    assert HRMConfig.from_dict(json.loads(metadata["model_config"])) == growth.after
    assert (metadata["step"], metadata["tokens"], metadata["optimizer"]) == ("7", "900", name)
    assert growth_under_way(metadata) is None


def test_a_state_of_one_stack_under_two_names_grows(tmp_path: Path) -> None:
    model, optimizer = trained("adamw", shared_stacks=True)
    metadata = {"step": "7", "optimizer": "adamw", "model_config": json.dumps(model.config.to_dict())}
    save_state(tmp_path / "shared.safetensors", tensors_of(model, optimizer), metadata)
    growth = grow_files(tmp_path / "shared.safetensors", tmp_path / "out", SIZES)
    tensors, _ = load_state(state_path(tmp_path / "out", 7))
    bigger = growth.model(model)
    expected = tensors_of(bigger, growth.optimizer(optimizer, model, bigger))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert difference(bigger, model) <= reordering(bigger.config)


@pytest.mark.parametrize("mode", ["ramped", "masked"])
def test_a_state_carries_a_ramp_under_both_its_names(tmp_path: Path, mode: str) -> None:
    source = saved(tmp_path / "run", "adamw")
    options = {"mode": mode, "mask_steps": 30, "seed": 2}
    growth = grow_files(state_path(source, 7), tmp_path / "out", SIZES, **options)
    _, metadata = load_state(state_path(tmp_path / "out", 7))
    assert growth_under_way(metadata) == (growth, 7)
    with pytest.raises(ValueError, match="mode 'ramped' is still under way; train on to its end first"):
        grow_files(tmp_path / "out", tmp_path / "more", {"hidden_size": 64})


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-size", "16"], "hrmcore grow: hidden_size would shrink from 32 to 16; models only grow"),
        (["--heads", "3"], "config: hidden_size 32 must be a multiple of num_attention_heads 3"),
        (
            ["--cycles", "3", "3"],
            "other cycles change what the model computes; if that is meant, add --change-function",
        ),
        (["--ffn", "many"], "argument --ffn: invalid int value: 'many'"),
        ([], "grow: say what grows: --hidden-size, --layers"),
        (["--ffn", "64", "--mode", "masked", "--mask-steps", "3"], "a checkpoint cannot carry mode 'ramped'"),
        (["--ffn", "64", "--mode", "gentle"], "grow: mode must be one of zero, ramped, got 'gentle'"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["grow", str(checkpoint), str(tmp_path / "out"), *arguments])
    except SystemExit as ended:  # argparse's own
        status = int(ended.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_more_cycles_with_the_flag(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--cycles", "3", "2", "--change-function"]
    assert main(["grow", str(checkpoint), str(tmp_path / "out"), *arguments]) == 0
    assert HRM.from_pretrained(tmp_path / "out").config.H_cycles == 3


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path) -> str:
    assert main(["grow", str(source), str(out), "--ffn", "64"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_exists_is_not_written_to(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert "out: exists already; remove it or name another folder" in refused(capsys, checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_sources_that_cannot_be_grown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    source = saved(tmp_path / "run", "adamw", optimizer="momentum")
    assert "its optimizer 'momentum' is unknown; known are adamw, adamatan2" in refused(
        capsys, source, tmp_path / "out"
    )
    path = state_path(source, 7)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert "damaged, the tensors' checksum" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_with_a_state_that_no_rule_knows(tmp_path: Path) -> None:
    model, optimizer = trained("adamw")
    tensors = tensors_of(model, optimizer)
    tensors["optimizer.velocity.embed_tokens.weight"] = torch.zeros(300, 32)
    metadata = {"step": "7", "optimizer": "adamw", "model_config": json.dumps(model.config.to_dict())}
    save_state(tmp_path / "odd.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match="unknown optimizer slot 'velocity'"):
        grow_files(tmp_path / "odd.safetensors", tmp_path / "out", SIZES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.safetensors"]


def test_a_damaged_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    source = copy_of(checkpoint, tmp_path / "source")
    edit_config(source, hidden_size=64)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* has shape"):
        grow_files(source, tmp_path / "out", SIZES)


# Memory

PEAK = """
import sys
from pathlib import Path
import torch
import hrmcore
from hrmcore.growth.files import grow_files

how, source, out, tiny = sys.argv[1:]

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
grow_files(tiny, out + "-tiny", {"intermediate_size": 64})  # what is imported and allocated once
before = peak()
if how == "files":
    grow_files(source, out, {"hidden_size": 1024})
    grow_files(source + "/state.safetensors", out + "-state", {"hidden_size": 1024})
else:
    hrmcore.grow(hrmcore.HRM.from_pretrained(source), hidden_size=1024).save_pretrained(out)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_growing_files_holds_one_model_and_one_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """The source's mapped pages and one tensor, not two models; the same growth in memory goes beyond the bound.

    A training state, three times as large with AdamW's moments and read tensor by tensor, stays within it as well.
    """
    config = HRMConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=1024,
        num_layers_per_stack=2,
        num_attention_heads=4,
        head_dim=64,
    )
    torch.manual_seed(0)
    source = HRM(config)
    source.save_pretrained(tmp_path / "source")
    metadata = {"step": "7", "optimizer": "adamw", "model_config": json.dumps(config.to_dict())}
    save_state(
        tmp_path / "source" / "state.safetensors", tensors_of(source, optim.AdamW(source.parameters())), metadata
    )
    model = (tmp_path / "source" / "model.safetensors").stat().st_size
    assert (tmp_path / "source" / "state.safetensors").stat().st_size > 2.9 * model
    tensor = 4 * 2 * 1024 * 1024  # gate_up_proj, once grown
    bound = model + 4 * tensor  # the new entries, the grown tensor, and room for the allocator

    def peak(how: str) -> int:
        command = [sys.executable, "-c", PEAK, how, str(tmp_path / "source"), str(tmp_path / how), str(checkpoint)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)

    assert peak("files") <= bound < 4 * model < peak("memory")
