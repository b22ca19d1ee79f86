"""The logit lens and `hrmcore inspect`: against the model itself, cut short where a step ends."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.command_line import hrmcore
from torch import Tensor, nn

from hrmcore import plots
from hrmcore.commands.generate import printable
from hrmcore.config import HRMConfig
from hrmcore.engine.engine import Engine, load
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.lens import look, visits
from hrmcore.lens_names import token_name, visit_name
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "what is 3 plus 4?"


def random_model(**changes: Any) -> HRM:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers_per_stack": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return HRM(HRMConfig(**values | changes)).requires_grad_(False)


IDS = [3, 14, 15, 9, 2, 6, 5]


@pytest.mark.parametrize("prefix", [None, 0, 4, 7])
@pytest.mark.parametrize(
    "changes", [{}, {"H_cycles": 3, "L_cycles": 1}, {"num_layers_per_stack": 1}, {"prefix_lm": False}], ids=str
)
def test_the_last_step_is_the_models_logits_to_the_bit(changes: dict[str, Any], prefix: int | None) -> None:
    model = random_model(**changes)
    seen = look(model, IDS, prefix)
    assert torch.equal(seen.logits[-1], model(torch.tensor([IDS]), prefix)[0, -1])
    of_runner = TorchRunner(model).logits(IDS, len(IDS) if prefix is None else prefix)
    assert torch.equal(seen.logits[-1], torch.as_tensor(of_runner)[-1])
    assert len(seen.steps) == len(seen.logits) == model.config.cache_slots
    assert seen.answer == int(seen.logits[-1].argmax())


def test_the_last_step_is_the_engines_logits(checkpoint: Path) -> None:
    """The engine in C++ adds up in another order: the same numbers to float32's precision, the same answer."""
    engine = load(checkpoint, dtype="float32")
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.prompt(QUESTION)
    seen = look(HRM.from_pretrained(checkpoint), prompt)
    theirs = engine.logits(prompt)[-1]
    assert float((seen.logits[-1] - theirs).norm() / theirs.norm()) < 1e-5
    assert seen.answer == int(theirs.argmax())


def cut(model: HRM, stack: str, layers: int) -> HRM:
    """A copy of which one stack has only its first layers."""
    shorter = copy.deepcopy(model)
    module = shorter.L_module if stack == "L" else shorter.H_module
    module.layers = module.layers[:layers]
    return shorter


def test_each_step_answers_as_if_the_recurrence_ended_there() -> None:
    """One cycle of each, three layers: a model whose H stack is cut after a layer answers what that layer's step says.

    The same for L: a first visit read by the head, which no cut model does, so it is taken from `states`.
    """
    model = random_model(H_cycles=1, L_cycles=1, num_layers_per_stack=3)
    seen = look(model, IDS)
    ids = torch.tensor([IDS])
    for layers in (1, 2, 3):
        assert torch.allclose(seen.logits[2 + layers], cut(model, "H", layers)(ids)[0, -1], rtol=1e-5, atol=1e-6)
        _, _, state = next(iter(states(cut(model, "L", layers))))
        assert torch.allclose(seen.logits[layers - 1], model.lm_head(state)[-1], rtol=1e-5, atol=1e-6)
    assert [(step.stack, step.h, step.l, step.layer) for step in seen.steps] == [
        ("L", 0, 0, 0),
        ("L", 0, 0, 1),
        ("L", 0, 0, 2),
        ("H", 0, 1, 0),
        ("H", 0, 1, 1),
        ("H", 0, 1, 2),
    ]


def states(model: HRM) -> Any:
    from hrmcore.model import Layout

    return model.states(torch.tensor(IDS), Layout.of([len(IDS)], [len(IDS)]))


def test_every_visit_answers_what_the_head_reads_from_its_state() -> None:
    model = random_model(H_cycles=2, L_cycles=3)
    seen = look(model, IDS)
    for visit, (h, l, state) in enumerate(states(model)):  # noqa: E741
        row = 2 * visit + 1
        step = seen.steps[row]
        assert (step.h, step.l) == (h, l)
        assert torch.allclose(seen.logits[row], model.lm_head(state)[-1], rtol=1e-5, atol=1e-6)
    told = list(visits(model, IDS))
    assert [said[:3] for said in told] == [(s.h, s.l, s.token) for s in seen.steps[1::2]]
    assert [p for *_, p in told] == pytest.approx([s.probability for s in seen.steps[1::2]], rel=1e-5)


def test_the_measures_are_what_they_say() -> None:
    model = random_model(H_cycles=2, L_cycles=2)
    entering: list[Tensor] = []
    blocks = [*model.L_module.layers, *model.H_module.layers]

    def enter(_: nn.Module, given: tuple[Any, ...]) -> None:
        entering.append(given[1][-1].double())

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    seen = look(model, IDS)
    for hook in hooks:
        hook.remove()
    logs = seen.logits.double().log_softmax(-1)
    for index, step in enumerate(seen.steps):
        expected = F.kl_div(logs[index], logs[-1], log_target=True, reduction="sum")
        assert step.kl == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
        assert step.token == int(seen.logits[index].argmax())
        assert step.probability == pytest.approx(float(logs[index].max().exp()), rel=1e-5)
        assert step.answer_probability == pytest.approx(float(logs[index, seen.answer].exp()), rel=1e-5)
        if step.layer == 0:  # what enters the second layer is what the first one left
            assert step.norm == pytest.approx(float(entering[index + 1].norm()), rel=1e-5)
    assert seen.steps[-1].kl == 0

    def unit(u: Tensor) -> Tensor:
        return u / u.square().mean().add(model.config.rms_norm_eps).sqrt()

    left = entering[1::2]  # the streams after the first layer of every visit, L, L, H, L, L, H
    finals = [state[-1].double() for _, _, state in states(model)]
    starts = [
        unit(model.z_L_init.double()),
        finals[0],
        unit(model.embed_tokens(torch.tensor(IDS[-1])).double() * 32**0.5),
    ]
    for stream, before, step in zip(left, [*starts, finals[1]], seen.steps[::2], strict=False):
        expected = (unit(stream) - before).norm() / before.norm()
        assert step.change == pytest.approx(float(expected), rel=1e-4)


def test_a_position_is_needed() -> None:
    for ids, prefix in ([], None), (IDS, 8), (IDS, -1):
        with pytest.raises(ValueError, match="prefix_length must be"):
            look(random_model(), ids, prefix)


# --- the picture ---------------------------------------------------------------------------------------------------


def test_the_picture_is_readable_at_128_steps(figures: list[Any], tmp_path: Path) -> None:
    """The 1B's 2 · (3 + 1) visits of 16 layers: every cell's text lies inside its cell, at 7.5 points or more."""
    model = random_model(num_layers_per_stack=16)
    seen = look(model, IDS)
    texts = ["internationally", "␣Paris", "<object>", "MMMMMMMM", "$x^2$"]
    steps = [
        {
            **vars(step),
            "text": texts[index % len(texts)],
            "probability": 1.0,
            "visit": visit_name(step.h, step.stack, step.l),
        }
        for index, step in enumerate(seen.steps)
    ]
    report = {"prompt": "$1 " * 100, "answered": "", "answer": "␣Paris", "layers": 16, "steps": steps}
    plots.lens(report, tmp_path / "lens.png")
    [figure] = figures
    figure.draw_without_rendering()  # saving had another resolution
    grid = figure.axes[0]
    cells = [text for text in grid.texts if text.get_text()]
    assert len(cells) == 128
    assert sum(text.get_fontsize() == 9 for text in cells) > 100
    for index, text in enumerate(cells):
        column, layer = divmod(index, 16)
        (left, top), (right, bottom) = grid.transData.transform([(column, layer), (column + 1, layer + 1)])
        box = text.get_window_extent()
        assert left <= box.x0, text.get_text()
        assert box.x1 <= right, text.get_text()
        assert bottom <= box.y0 <= box.y1 <= top
        assert text.get_fontsize() >= 7.5
    width, height = figure.get_size_inches()
    assert width < 16  # a page or a screen, not a banner
    assert height < 16


# --- the command ---------------------------------------------------------------------------------------------------


def test_inspect_tells_table_json_and_picture(
    checkpoint: Path, engine: Engine, tmp_path: Path, figures: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "lens.json", tmp_path / "lens.png"
    options = ["--model", str(checkpoint), "--answer-token", "3", "--out", str(out), "--plot", str(picture)]
    assert hrmcore("inspect", QUESTION, *options) == 0
    report = json.loads(out.read_text())
    assert engine.tokenizer is not None
    tokens = list(engine.tokens(engine.tokenizer.prompt(QUESTION), max_new_tokens=3))
    assert report["answered"] == engine.tokenizer.decode(tokens[:2])
    assert report["answer"] == token_name(engine.tokenizer, tokens[2])
    assert report["steps"][-1]["token"] == tokens[2]
    names = ["L1.1", "L1.2", "H1", "L2.1", "L2.2", "H2"]
    assert [step["visit"] for step in report["steps"]] == names
    assert picture.read_bytes().startswith(b"\x89PNG")
    [figure] = figures
    grid, *curves = figure.axes
    assert [tick.get_text() for tick in grid.get_xticklabels()] == names
    assert figure.get_suptitle().startswith(f"The answer {report['answer']} stands from ")
    for axes, key in zip(curves, ("kl", "norm", "change"), strict=True):
        assert list(axes.lines[0].get_ydata()) == [step[key] for step in report["steps"]]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["visit", *names]
    assert f"{report['steps'][2]['probability']:.1%}" in lines[3]


def test_watching_ends_with_the_engines_answer(
    checkpoint: Path, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hrmcore("inspect", QUESTION, "--model", str(checkpoint), "--watch", "--max-new-tokens", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith(repr(printable(engine.generate(QUESTION, max_new_tokens=4))))
    assert all(line.index("L1.1") < line.index("H1") < line.index("H2") for line in lines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert hrmcore("inspect", QUESTION, "--model", str(checkpoint), "--watch", "--max-new-tokens", "2") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2
    assert out.count("\r") == 2 * (6 + 1)  # once a visit, and the finished line
    assert lines[1].split("  ", 1)[1] in out
    monkeypatch.setenv("COLUMNS", "60")
    assert hrmcore("inspect", QUESTION, "--model", str(checkpoint), "--watch", "--max-new-tokens", "1") == 0
    *rewritten, whole = capsys.readouterr().out.replace("\x1b[K", "").split("\r")[1:]
    assert max(map(len, rewritten)) == 59  # a row that is full cannot be rewritten
    assert rewritten[-1].startswith("…")
    assert len(whole) > 60


def test_tokens_have_names(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    named = {token: token_name(tokenizer, token) for token in range(tokenizer.vocab_size)}
    assert named[tokenizer.eoa] == "<eoa>"
    assert named[tokenizer.condition_ids["direct"]] == "<direct>"
    assert "↵" in named.values()
    assert any("␣" in text for text in named.values())
    assert all(text and not any(c.isspace() for c in text) for text in named.values())
    assert token_name(tokenizer, tokenizer.vocab_size + 3) == f"#{tokenizer.vocab_size + 3}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: prompt"),
        (["x", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["", "--model", "MODEL"], "the prompt is empty"),
        (["x", "--model", "MODEL", "--condition", "shout"], "unknown condition 'shout'"),
        (["x", "--model", "MODEL", "--answer-token", "0"], "must be at least 1"),
        (["x", "--model", "MODEL", "--threads", "0"], "threads must be"),
        (["x", "--model", "MODEL", "--out", "no/such/folder/x.json"], "no such folder"),
        (["x", "--model", "MODEL", "--plot", "no/such/folder/x.png"], "no such folder"),
        (["x", "--model", "MODEL", "--plot", "lens"], "lens: a picture's name must end in one of"),
        (["1 " * 3000, "--model", "MODEL"], "leaves no room in the context of 2048 tokens"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hrmcore("inspect", *(str(checkpoint) if word == "MODEL" else word for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("hrmcore inspect: ")
    assert message in err
