"""[lora]: adapters over frozen weights, from the run file to what peft and transformers make of the result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import hrmcore
from support.runs import MODEL, WORDS, final_state, metrics, repetitions, rewrite
from support.two_ranks import Ranks
from torch import Tensor

from hrmcore.checkpoint.adapter import merge_adapter
from hrmcore.checkpoint.hrm_text import load_model, save_model
from hrmcore.config import ALL_PARTS, BASES, PARTS, HRMConfig, LoraConfig, part_rows
from hrmcore.data.packing import PackedBatch, pack
from hrmcore.data.records import Rejected, read_records, tokenize
from hrmcore.lora import AdaptedLinear, adapted_model, factors_of, quantised_rows
from hrmcore.model import HRM
from hrmcore.ops.backend import reference_ops
from hrmcore.tokenizer import Tokenizer, train_tokenizer
from hrmcore.train.explanation import explain
from hrmcore.train.run_file import OPTIMIZERS, read_config
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "no_peak")

TABLE = '[lora]\nrank = 4\nalpha = 6.0\nbase = "float32"\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 checkpoint with a tokenizer, and records beside it. Its files cannot be written."""
    folder = tmp_path_factory.mktemp("base")
    records = repetitions(WORDS)
    tokenizer = train_tokenizer((record["instruction"] for record in records), folder, vocab_size=330)
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eoa, **MODEL, "num_layers_per_stack": 2}
    save_model(HRM(HRMConfig(**sizes)), folder)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for file in folder.iterdir():
        file.chmod(0o444)
    return folder


@pytest.fixture
def run_file(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        f'train_files = ["{base}/train.jsonl"]\nheldout_files = ["{base}/train.jsonl"]\ninit_from = "{base}"\n'
        f'out = "{tmp_path}/out"\nsteps = 6\nbatch_tokens = 256\nlearning_rate = 0.01\nwarmup_steps = 2\nseed = 7\n'
        f"eval_every = 6\nsave_every = 3\n{TABLE}"
    )
    return path


def batch_of(base: Path, count: int = 12) -> PackedBatch:
    records = read_records(base / "train.jsonl", Rejected())
    return pack(tokenize(records, Tokenizer.load(base), 64, Rejected()), range(count))


def shaken(model: HRM) -> HRM:
    """B is zero at first, and then A gets no gradient: both random."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def frozen_weight(linear: AdaptedLinear) -> Tensor:
    weight = linear.weight.float()
    return weight if linear.scale is None else weight * linear.scale[:, None]


def projections(model: HRM) -> dict[str, AdaptedLinear]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}
    return {name: layer for name, layer in layers.items() if name != "lm_head"}


def dense(model: HRM, lora: LoraConfig) -> HRM:
    """The same model with ordinary weights W + s·B·A, all of them trained."""
    made = HRM(model.config)
    weights = {"z_L_init": model.z_L_init, "embed_tokens.weight": model.embed_tokens.weight.float()}
    weights["lm_head.weight"] = model.lm_head.weight.float()
    factors = factors_of(model)
    for name, linear in projections(model).items():
        weights[f"{name}.weight"] = total = frozen_weight(linear).clone()
        layer, _, projection = name.rpartition(".")
        for part, rows in part_rows(projection, model.config).items():
            if (pair := factors.get(f"model.{layer}.{part}")) is not None:
                total[rows] += lora.alpha / lora.rank * pair[1] @ pair[0]
    made.load_state_dict(weights)
    return made


# The gradients


@pytest.mark.parametrize("held", BASES)
@pytest.mark.parametrize("horizon", [None, 5, 2])
def test_gradients_are_those_of_the_dense_deltas(base: Path, held: str, horizon: int | None) -> None:
    """dA = s·Bᵀ G and dB = s·G Aᵀ, where G, the gradient of the dense weight, is summed over all its visits."""
    lora = LoraConfig(rank=3, alpha=4.5, base=held)
    model, batch = shaken(adapted_model(base, lora)), batch_of(base)
    whole = dense(model, lora)
    loss, expected_loss = model.loss(batch, horizon), whole.loss(batch, horizon)
    loss.backward()
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    compared = 0
    for name, linear in projections(model).items():
        full = whole.get_parameter(f"{name}.weight").grad
        assert full is not None
        for part, rows in part_rows(name.rpartition(".")[2], model.config).items():
            adapter = linear.get_submodule(part.rpartition(".")[2])
            for factor, expected in (
                (adapter.A, 1.5 * adapter.B.T @ full[rows]),
                (adapter.B, 1.5 * full[rows] @ adapter.A.T),
            ):
                assert float((factor.grad - expected).norm() / expected.norm()) < 1e-4, (name, part)
                compared += 1
    assert compared == 2 * 2 * 2 * len(ALL_PARTS)  # two stacks of two layers


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("mlp.gate_proj", "down_proj"), ("gate_proj",)])
def test_only_the_targets_have_adapters(base: Path, targets: tuple[str, ...]) -> None:
    lora = LoraConfig(rank=2, targets=targets, base="float32")
    model = shaken(adapted_model(base, lora))
    wanted = {part for part in ALL_PARTS if any(part.endswith(target) for target in targets)}
    assert {name.partition(".layers.")[2].partition(".")[2] for name in factors_of(model)} == wanted
    batch = batch_of(base)
    loss = model.loss(batch)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert loss.item() == pytest.approx(dense(model, lora).loss(batch).item(), rel=1e-5)


@pytest.mark.parametrize("held", BASES)
def test_the_fused_ops_compute_what_plain_torch_does(base: Path, held: str) -> None:
    model, batch = shaken(adapted_model(base, LoraConfig(rank=3, base=held))), batch_of(base)
    gradients = []
    for double in (False, True):
        model.zero_grad()
        with reference_ops() if double else nullcontext():
            (model.double() if double else model).loss(batch, horizon=5).backward()
        gradients.append({name: parameter.grad.double() for name, parameter in model.named_parameters()})
    for name, exact in gradients[1].items():
        assert float((gradients[0][name] - exact).norm() / exact.norm()) < 1e-4, name


def test_new_adapters_change_nothing_and_bfloat16_is_near(base: Path) -> None:
    batch = batch_of(base)
    expected = load_model(base).loss(batch).item()
    model = adapted_model(base, LoraConfig(base="float32"))
    assert model.loss(batch).item() == pytest.approx(expected, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert adapted_model(base, LoraConfig()).loss(batch).item() == pytest.approx(expected, rel=0.02)


def test_int8_rows_are_off_by_half_a_step() -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 3, 40)[:, None]
    weight[7] = 0
    whole, scale = quantised_rows(weight)
    assert whole.dtype == torch.int8
    error = (whole.double() * scale.double()[:, None] - weight.double()).abs()
    assert bool((error <= 0.5001 * scale.double()[:, None]).all())
    assert not whole[7].any()
    assert set(whole.abs().amax(1).tolist()) == {0, 127}


# The command


def checksums(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in folder.iterdir()
    }


def deltas(adapter: Path) -> dict[str, Tensor]:
    """alpha / r · B·A of every layer, float64, from the files as peft's documentation describes them."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {re.fullmatch(r"base_model\.model\.(.*)\.lora_[AB]\.weight", key)[1] for key in tensors}
    scaling = settings["lora_alpha"] / settings["r"]
    return {
        name: scaling
        * tensors[f"base_model.model.{name}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{name}.lora_A.weight"].double()
        for name in names
    }


@pytest.mark.parametrize("held", BASES)
def test_the_command_trains_merges_and_leaves_the_base_alone(
    base: Path, run_file: Path, tmp_path: Path, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run_file, '"float32"', f'"{held}"')
    before = checksums(base)
    assert hrmcore("train", str(run_file)) == 0
    said = capsys.readouterr().err
    assert "M of adapters, which alone are trained" in said
    assert f"{tmp_path}/out/adapter: the adapter, for peft" in said
    rows = metrics(tmp_path / "out")
    assert rows[-1]["heldout_loss"] < rows[0]["loss"] - 0.1
    assert checksums(base) == before

    old, new = load_model(base).state_dict(), load_file(tmp_path / "out" / "checkpoint" / "model.safetensors")
    added = deltas(tmp_path / "out" / "adapter")
    assert len(added) == 2 * 2 * len(ALL_PARTS)
    changed = 0
    for name, weight in old.items():
        layer, _, projection = name.removesuffix(".weight").rpartition(".")
        released = f"model.{name}" if name != "lm_head.weight" else name
        released = (
            released.replace("gqkv", "attn.gqkv").replace("o_proj", "attn.o_proj") if "layers" in name else released
        )
        released = released.replace("gate_up", "mlp.gate_up").replace("down_proj", "mlp.down_proj")
        found, expected = new[released], weight.double().clone()
        for part, at in part_rows(projection, load_model(base).config).items() if projection in PARTS else ():
            expected[at] += added[f"model.{layer}.{part}"]
            changed += 1
        assert found.dtype == torch.float32
        assert float((found.double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name
        if projection not in PARTS:
            assert torch.equal(found, weight), name
    assert changed == len(added)
    assert hrmcore("generate", "repeat alpha beta", "--model", f"{tmp_path}/out/checkpoint") == 0
    state = final_state(tmp_path / "out", 6)
    assert not any(name.endswith("_proj.weight") for name in state)  # a state holds no frozen weight


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", "mlp.gate_proj"])
def test_peft_and_transformers_make_the_merged_model_of_it(base: Path, run_file: Path, targets: str) -> None:
    from peft import PeftModel
    from transformers import HrmTextForCausalLM

    rewrite(run_file, "alpha = 6.0", f'alpha = 6.0\ntargets = ["{targets}"]')
    assert hrmcore("train", str(run_file)) == 0
    out = run_file.parent / "out"
    theirs = PeftModel.from_pretrained(HrmTextForCausalLM.from_pretrained(base), out / "adapter").eval()
    ids = torch.arange(5, 29).view(2, 12)
    kinds = (torch.arange(12) < 5).long().expand_as(ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids, token_type_ids=kinds).logits
        plain = load_model(base)(ids, prefix_length=5)
        found = load_model(out / "checkpoint")(ids, prefix_length=5)
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-5
    assert float((found - plain).norm() / plain.norm()) > 100 * error  # training did something


@pytest.mark.parametrize("source", ["bfloat16", "float16"])
def test_a_merged_checkpoint_keeps_its_types(base: Path, tmp_path: Path, source: str) -> None:
    dtype = getattr(torch, source)
    save_model(load_model(base), tmp_path / "half", dtype=dtype)
    lora = LoraConfig(rank=2, targets=("o_proj",))
    model = shaken(adapted_model(tmp_path / "half", lora))
    merge_adapter(tmp_path / "half", lora, factors_of(model), tmp_path / "merged")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "merged"))
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    name = "model.H_module.layers.1.attn.o_proj.weight"
    a, b = factors_of(model)["model.H_module.layers.1.self_attn.o_proj"]
    exact = old[name].double() + 8.0 * (b.double() @ a.double())
    assert float((new[name].double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
    assert all(torch.equal(old[key], new[key]) for key in old if "o_proj" not in key)
    with pytest.raises(ValueError, match="half: is the checkpoint itself"):
        merge_adapter(tmp_path / "half", lora, factors_of(model), tmp_path / "half")
    if dtype == torch.float16:
        large = {key: (a, 1e8 * b) for key, (a, b) in factors_of(model).items()}
        with pytest.raises(ValueError, match=r"o_proj\.weight: with its adapter it does not fit torch.float16"):
            merge_adapter(tmp_path / "half", lora, large, tmp_path / "merged")


@pytest.mark.parametrize(
    ("optimizer", "precision", "held"),
    [
        *((name, "float32", "float32") for name in OPTIMIZERS),
        ("adamw", "bfloat16", "bfloat16"),
        ("adamatan2", "bfloat16", "int8"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(
    run_file: Path, tmp_path: Path, optimizer: str, precision: str, held: str
) -> None:
    rewrite(run_file, "seed = 7", f'seed = 7\noptimizer = "{optimizer}"\nprecision = "{precision}"\naccumulate = 2')
    rewrite(run_file, '"float32"\n', f'"{held}"\n') if held != "float32" else None
    if optimizer.startswith("sophia"):
        rewrite(run_file, "seed = 7", "seed = 7\ncurvature_every = 2")
    whole = read_config(run_file)
    Trainer(whole).run()
    stopped = replace(whole, out=f"{tmp_path}/stopped")
    first = Trainer(stopped)
    for _ in range(4):
        first._train_step()
    first.save()
    first._train_step()  # lost: it comes after the state
    first.close()
    Trainer(stopped).run()
    expected, found = final_state(tmp_path / "out", 6), final_state(tmp_path / "stopped", 6)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    files = [tmp_path / name / "checkpoint" / "model.safetensors" for name in ("out", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(run_file: Path, tmp_path: Path, ranks: Ranks) -> None:
    assert hrmcore("train", str(run_file)) == 0
    rewrite(run_file, f"{tmp_path}/out", f"{tmp_path}/two")
    answers = ranks.train(run_file)
    assert [status for status, _ in answers] == [0, 0], answers
    one, two = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("out", "two"))
    assert two == pytest.approx(one, rel=1e-5)


# What is wrong


WRONG: list[tuple[str, str]] = [
    ("rank = 0", "lora: rank must be at least 1, got 0"),
    ("rank = 5000", "lora: rank must be at most 4096"),
    ("rank = 2.5", "lora: rank must be of type int, got 2.5"),
    ("rank = true", "lora: rank must be of type int, got True"),
    ("alpha = 0", "lora: alpha must be at least 1e-06, got 0"),
    ("alpha = nan", "lora: alpha must be at most"),
    ('alpha = "16"', "lora: alpha must be of type float, got '16'"),
    ("targets = []", "lora: targets is empty; leave it out for all-linear"),
    ('targets = ["q"]', "lora: targets has 'q', which is none of all-linear, self_attn.gate_proj"),
    ('targets = ["lm_head"]', "lora: targets has 'lm_head', which is none of"),
    ("targets = [3]", "lora: targets must be of type tuple[str, ...], got [3]"),
    ('base = "int4"', "lora: base must be one of ('float32', 'bfloat16', 'int8'), got 'int4'"),
    ("base = 8", "lora: base must be of type str, got 8"),
    ("dropout = 0.1", "lora: unknown key 'dropout'; the keys are rank, alpha, targets, base"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_value_is_one_line(run_file: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run_file, TABLE, f"[lora]\n{line}\n")
    assert hrmcore("train", str(run_file)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"hrmcore train: {run_file}: {message}")


def without_init_from(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("init_from")]
    base = re.search(r'\["(.*)/train\.jsonl"\]', path.read_text())[1]
    model = "".join(f"{key} = {value}\n" for key, value in MODEL.items())
    path.write_text("\n".join([f'tokenizer = "{base}"', *lines, "[model]", model]))


WRONG_RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (
        lambda path: rewrite(path, TABLE, "").write_text("lora = 8\n" + path.read_text()),
        "lora must be a ta",
    ),
    "no checkpoint": (without_init_from, "train config: [lora] needs init_from"),
    "grow": (
        lambda path: path.write_text(path.read_text() + "[[grow]]\nat_tokens = 100\nintermediate_size = 96\n"),
        "train config: [lora] leaves the weights as they are; remove [[grow]] tables",
    ),
    "sharded": (
        lambda path: rewrite(path, "seed = 7", 'seed = 7\nparallel = "sharded"'),
        "train config: [lora] leaves the weights as they are; remove parallel = 'sharded'",
    ),
    "recompute": (
        lambda path: rewrite(path, "seed = 7", 'seed = 7\nrecompute = "visit"'),
        "train config: [lora] computes and launches as a run does by default; remove recompute = 'visit'",
    ),
    "graphs": (
        lambda path: rewrite(path, "seed = 7", 'seed = 7\ndevice = "cuda"\ncuda_graphs = true'),
        "train config: [lora] computes and launches as a run does by default; remove cuda_graphs",
    ),
}


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_what_does_not_go_together_is_one_line(run_file: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = WRONG_RUNS[case]
    spoil(run_file)
    assert hrmcore("train", str(run_file)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"hrmcore train: {run_file}: {message}")


def test_a_run_never_replaces_its_base(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hrmcore("train", str(run_file)) == 0
    rewrite(run_file, re.search("init_from = .*", run_file.read_text())[0], f'init_from = "{tmp_path}/out/checkpoint"')
    capsys.readouterr()
    assert hrmcore("train", str(run_file)) == 2
    assert "the merged model would replace init_from" in capsys.readouterr().err


def test_states_of_adapters_know_what_they_belong_to(
    base: Path, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(read_config(run_file))
    trainer._train_step()
    trainer.save()
    trainer.close()
    text = run_file.read_text()
    other = tmp_path / "other"
    save_model(HRM(load_model(base).config), other, tokenizer_folder=base)

    def refused(new_text: str, message: str) -> None:
        run_file.write_text(new_text)
        capsys.readouterr()
        assert hrmcore("train", str(run_file)) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert message in err

    refused(text.replace("rank = 4", "rank = 5"), "lora changed since")
    refused(text.replace(TABLE, ""), "lora changed since")
    refused(text.replace(f'init_from = "{base}"', f'init_from = "{other}"'), "init_from changed since")
    state = tmp_path / "out" / "states" / "step-00000001.safetensors"
    begun = f'tokenizer = "{base}"\n' + text.replace(f'init_from = "{base}"', f'init_from = "{state}"')
    refused(begun.replace(TABLE, ""), "holds adapters alone; name the checkpoint/ that its run wrote")
    refused(begun, "holds adapters alone")


def test_set_and_explain_know_the_table(run_file: Path) -> None:
    config = read_config(run_file, ["lora.rank=2", "lora.base=int8", 'lora.targets=["o_proj"]'])
    assert config.lora == LoraConfig(2, 6.0, ("o_proj",), "int8")
    assert "\n[lora]  " in explain()
    for name in ("rank", "alpha", "targets", "base"):
        assert re.search(rf"\n  {name} +\S", explain().partition("\n[lora]")[2])


def test_a_base_that_is_not_finite_is_named(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    with torch.no_grad():
        model.H_module.layers[1].o_proj.weight[3, 4] = float("nan")
    save_model(model, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"'H_module\.layers\.1\.o_proj\.weight' has a value that is NaN"):
        adapted_model(tmp_path / "nan", LoraConfig())
