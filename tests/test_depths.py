"""L and H of different depths: configs, growth, checkpoints, the engine, the planner, the lens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import repetitions, write_run
from torch import Tensor

import hrmcore
from hrmcore import optim, plots
from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.cli import main
from hrmcore.commands import inspect
from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner, convert
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.growth.operators import Growth, grow
from hrmcore.lens import look
from hrmcore.model import HRM, graded_visits
from hrmcore.planner import activation_elements, layer_weights, memory, parameters, training_flops
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = HRMConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers_per_stack=2,
    num_attention_heads=2,
    head_dim=16,
    L_cycles=2,
    max_position_embeddings=64,
)
UNEQUAL = [CONFIG.replace(num_layers_per_stack=3, H_layers=1), CONFIG.replace(num_layers_per_stack=1, H_layers=2)]
IDS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
PROMPT = 7


def random_model(config: HRMConfig) -> HRM:
    torch.manual_seed(0)
    return HRM(config).requires_grad_(False)


def logits(model: HRM) -> Tensor:
    return model(IDS, prefix_length=PROMPT)


def relative(ours: Any, theirs: Tensor) -> float:
    ours, theirs = torch.as_tensor(ours).detach(), theirs.detach()
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_a_config_has_one_way_to_say_its_depths() -> None:
    assert CONFIG.depths == (2, 2)
    assert CONFIG.replace(H_layers=2) == CONFIG
    three_one = UNEQUAL[0]
    assert three_one.depths == (3, 1)
    assert three_one.cache_slots == 2 * (2 * 3 + 1)
    assert HRMConfig.from_dict(three_one.to_dict()) == three_one
    for changes, message in (
        ({"H_layers": 0}, "H_layers must be at least 1, got 0"),
        ({"H_layers": 1.5}, "H_layers must be of type int"),
        ({"H_layers": 3, "shared_stacks": True}, "shared_stacks are one stack, H_layers 3 would make it two"),
    ):
        with pytest.raises(ValueError, match=message):
            CONFIG.replace(**changes)


# Growth

STEPS = ({"L_layers": 4}, {"H_layers": 3}, {"L_layers": 3, "H_layers": 5}, {"num_layers_per_stack": 3, "H_layers": 4})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_each_stack_grows_alone_and_the_logits_keep_their_bits(sizes: dict[str, int], interleaved: bool) -> None:
    model = random_model(CONFIG)
    bigger = grow(model, interleaved=interleaved, **sizes)
    both = sizes.get("num_layers_per_stack", 2)
    expected = sizes.get("L_layers", both), sizes.get("H_layers", both)
    assert bigger.config.depths == expected == (len(bigger.L_module.layers), len(bigger.H_module.layers))
    assert torch.equal(logits(bigger), logits(model))


def test_depths_and_the_other_sizes_grow_in_any_order() -> None:
    model = random_model(CONFIG)
    for order in itertools.permutations(({"L_layers": 3}, {"H_layers": 4}, {"hidden_size": 128}, {"L_layers": 5})):
        sizes = [size for size in order if size != {"L_layers": 3} or order.index(size) < order.index({"L_layers": 5})]
        bigger = model
        for size in sizes:
            bigger = grow(bigger, interleaved=True, **size)
        assert bigger.config.depths == (5, 4)
        assert relative(logits(bigger), logits(model)) <= 1e-6


def test_a_stack_does_not_shrink() -> None:
    for sizes, message in (
        ({"H_layers": 1}, "H_layers would shrink from 2 to 1"),
        ({"L_layers": 1, "H_layers": 3}, "L_layers would shrink from 2 to 1"),
        ({"num_layers_per_stack": 1}, "num_layers_per_stack would shrink from 2 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Growth.of(CONFIG, sizes)


def test_the_optimizer_travels_to_the_layers_that_were_there() -> None:
    model = random_model(CONFIG).requires_grad_(True)
    optimizer = optim.AdamAtan2(model.parameters(), lr=1e-3)
    logits(model).square().sum().backward()
    optimizer.step()
    growth = Growth.of(CONFIG, {"H_layers": 4}, interleaved=True)
    bigger = growth.model(model)
    larger = growth.optimizer(optimizer, model, bigger)
    for stack, places in (("L_module", {0: 0, 1: 1}), ("H_module", {0: 0, 2: 1})):
        for layer, block in enumerate(getattr(bigger, stack).layers):
            found = larger.state.get(block.o_proj.weight)
            assert found is not None
            if layer not in places:
                assert not any(value.any() for value in found.values())  # as a fresh one
                continue
            old = optimizer.state[getattr(model, stack).layers[places[layer]].o_proj.weight]
            assert torch.equal(found["exp_avg"], old["exp_avg"])


# Checkpoints and the engine


@pytest.mark.parametrize("config", UNEQUAL, ids=lambda config: str(config.depths))
def test_only_hrmcore_loads_what_is_written_of_it(config: HRMConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, HrmTextForCausalLM

    model = random_model(config)
    with pytest.raises(ValueError, match=r"H_layers is [12]: readers of the hrm_text format would compute another"):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    model.save_pretrained(tmp_path / "own", allow_xpos=True)
    again = HRM.from_pretrained(tmp_path / "own")
    assert again.config == config
    assert torch.equal(logits(again), logits(model))
    for reader in (HrmTextForCausalLM, AutoModelForCausalLM):
        with pytest.raises(KeyError, match="hrmcore"):
            reader.from_pretrained(tmp_path / "own")
    random_model(CONFIG).save_pretrained(tmp_path / "equal")
    assert "H_layers" not in json.loads((tmp_path / "equal" / "config.json").read_text())


@pytest.mark.parametrize("config", UNEQUAL, ids=lambda config: str(config.depths))
def test_the_engine_computes_what_the_model_does(config: HRMConfig, tmp_path: Path) -> None:
    model = random_model(config)
    expected = logits(model)[0]
    save_model(model, tmp_path / "model", allow_xpos=True)
    runner = CpuRunner.from_checkpoint(tmp_path / "model", "float32", None, 1, 1 << 20)
    assert runner.parameters == parameters(config) + config.hidden_size
    ids = IDS[0].tolist()
    assert relative(runner.logits(ids, PROMPT), expected) <= 1e-5
    reference = TorchRunner(model)
    for each in (runner, reference):
        (handle,), first = each.open([ids[:PROMPT]], [PROMPT])
        rows = [first, *(each.step([handle], [token]) for token in ids[PROMPT:])]
        assert relative(torch.cat([torch.as_tensor(row) for row in rows]), expected[PROMPT - 1 :]) <= 1e-5
    assert reference.cache_bytes_per_token == 4 * 2 * 2 * 16 * config.cache_slots


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_packed_file_keeps_the_depths_and_the_bits(dtype: str, tmp_path: Path) -> None:
    config = UNEQUAL[0]
    save_model(random_model(config), tmp_path / "model", allow_xpos=True)
    convert(tmp_path / "model", tmp_path / "packed", dtype)
    runners = [
        CpuRunner.from_checkpoint(tmp_path / folder, kind, None, 1, 1 << 20)
        for folder, kind in (("model", dtype), ("packed", "auto"))
    ]
    assert runners[1].config == config
    ids = IDS[0].tolist()
    first, second = (runner.logits(ids, PROMPT) for runner in runners)
    assert (first == second).all()
    engine = hrmcore.load(tmp_path / "packed")
    assert len(list(engine.tokens(ids, max_new_tokens=5, ignore_eos=True))) == 5


# What it costs


@pytest.mark.parametrize("config", [*UNEQUAL, CONFIG], ids=lambda config: str(config.depths))
@pytest.mark.parametrize("horizon", [2, 4, None])
def test_the_planner_counts_each_stack(config: HRMConfig, horizon: int | None) -> None:
    """Against a walk over the visits, which the model says carry gradient."""
    assert parameters(config) == sum(parameter.numel() for parameter in random_model(config).parameters())
    depths = dict(zip("LH", config.depths, strict=True))
    visits = list(itertools.product(range(config.H_cycles), range(config.L_cycles + 1)))
    graded = graded_visits(config.H_cycles, config.L_cycles, horizon)
    stacks = attention = kept = 0
    for visit in visits:
        layers = depths["H" if visit[1] == config.L_cycles else "L"]
        backward = visit in graded
        stacks += 100 * layers * layer_weights(config) * (2 + 4 * backward)
        attention += 900 * layers * config.attention_width * (4 + 8 * backward)
        kept += backward * 100 * (4 * activation_elements(config, layers) + 4 * layers * config.num_attention_heads)
    kept -= 90 * 4 * 2 * (config.hidden_size + config.intermediate_size)  # the last MLP, of the supervised tenth alone
    flops = training_flops(config, horizon, 100, 10, 900)
    assert (flops.stacks, flops.attention) == (stacks, attention)
    assert memory(config, horizon, 100, 0.1, 1, "float32").activations == kept


# The lens


@pytest.mark.parametrize("config", UNEQUAL, ids=lambda config: str(config.depths))
def test_the_lens_shows_every_layer_of_every_visit(config: HRMConfig, tmp_path: Path, figures: list[Any]) -> None:
    model = random_model(config)
    seen = look(model, IDS[0].tolist(), PROMPT)
    assert torch.equal(seen.logits[-1], model(IDS[:1], PROMPT)[0, -1])
    places = [(step.h, step.stack, step.l, step.layer) for step in seen.steps]
    assert len(places) == len(set(places)) == config.cache_slots
    assert {stack: 1 + max(p[3] for p in places if p[1] == stack) for stack in "LH"} == dict(
        zip("LH", config.depths, strict=True)
    )
    shown = [
        {"visit": inspect.visit_name(step.h, step.stack, step.l), "text": str(step.token), **vars(step)}
        for step in seen.steps
    ]
    report = {"prompt": "?", "answered": "", "answer": "!", "layers": max(config.depths), "steps": shown}
    last = [step["text"] for step in shown if step["layer"] == config.depths[step["stack"] == "H"] - 1]
    assert [line.split()[1] for line in inspect.table(report).splitlines()[1:]] == last
    assert len(last) == config.visits
    plots.lens(report, tmp_path / "lens.png")
    grid = figures[0].axes[0]
    assert len(grid.texts) == config.cache_slots
    assert len(grid.get_yticks()) == max(config.depths)


# A run, and its files


def test_a_run_grows_one_stack_and_its_files_grow_the_other(tmp_path: Path) -> None:
    stages = "[[grow]]\nat_tokens = 500\nL_layers = 2\n"
    keys = {"steps": 6, "batch_tokens": 256, "horizon_first": 5, "out": f"{tmp_path}/run"}
    path = write_run(tmp_path, repetitions(("alpha", "beta", "gamma", "delta")), stages=stages, **keys)
    trainer = Trainer(read_config(path))
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [grown] = [row for row in rows if "grown_parameters" in row]
    assert grown["growth_loss_after"] == pytest.approx(grown["growth_loss_before"], rel=1e-6)
    assert grown["grown_parameters"] == parameters(trainer.model.config)
    exported = HRM.from_pretrained(tmp_path / "run" / "checkpoint")
    assert exported.config.depths == (2, 1)
    assert Trainer(read_config(path)).model.config.depths == (2, 1)  # resumed after its end

    for source, out in (("run/checkpoint", "grown"), ("run", "grown-run")):
        assert main(["grow", str(tmp_path / source), str(tmp_path / out), "--H-layers", "3"]) == 0
    bigger = HRM.from_pretrained(tmp_path / "grown")
    assert bigger.config.depths == (2, 3)
    assert torch.equal(bigger(IDS, PROMPT), exported(IDS, PROMPT))
    text = path.read_text().split("[[grow]]")[0].replace("steps = 6", "steps = 7").replace('/run"', '/grown-run"')
    path.write_text(text.replace("num_layers_per_stack = 1", "num_layers_per_stack = 2\nH_layers = 3"))
    again = Trainer(read_config(path))
    assert again.step == 6
    again.run()
