import json
import os
import re
import sys

import pytest
import torch

import hrmcore.ops.swiglu
from hrmcore import _C, machine, microbench, plots
from hrmcore.ops.attention import PackedMask


def cheap(monkeypatch, name="swiglu"):
    """Leave an op only its smaller cases, for what is tested here is not speed."""
    page = microbench._page(name)
    cases = page.cases
    monkeypatch.setattr(page, "cases", lambda dtype=torch.float32: list(cases(dtype))[:4])


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in microbench.op_names():
            cheap(monkeypatch, name)
        return microbench.run(None, 2, 1e-3, as_json=False)


def test_op_names():
    assert microbench.op_names() == ["attention", "cross_entropy", "rms_norm", "rms_norm_inject", "rope", "swiglu"]


def test_report_has_a_line_for_every_op_direction_and_dtype(report):
    lines = {(line["op"], line["direction"], line["dtype"]) for line in report["ops"]}
    assert len(report["ops"]) == len(lines) == len(microbench.op_names()) * 2 * 2
    assert report["machine"]["isa"] == _C.isa()
    assert report["machine"]["threads"] == 2
    for line in report["ops"]:
        assert min(line["seconds"], line["peer_seconds"], line["gbs"], line["gflops"], line["share_of_limit"]) > 0
        assert line["times_torch"] == line["peer_seconds"] / line["seconds"]


def test_json_is_the_returned_report(monkeypatch, capsys):
    cheap(monkeypatch)
    report = microbench.run(["swiglu"], 1, 1e-3, as_json=True)
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_wrong_kernel_is_not_timed(monkeypatch, broken):
    cheap(monkeypatch)
    right = hrmcore.ops.swiglu.swiglu

    def wrong(ab):
        if broken == "forward":
            return right(ab) * 1.0001
        return right(ab).detach() + 1.0001 * (right(ab) - right(ab).detach())

    monkeypatch.setattr(hrmcore.ops.swiglu, "swiglu", wrong)
    with pytest.raises(
        microbench.WrongKernelError, match=r"swiglu, case 0, float32, \w+: the error of the .*puts|gradients"
    ):
        microbench.run(["swiglu"], 1, 1e-3, as_json=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_kernel_that_gives_nan_is_not_timed(monkeypatch, bad):
    cheap(monkeypatch)
    right = hrmcore.ops.swiglu.swiglu
    monkeypatch.setattr(hrmcore.ops.swiglu, "swiglu", lambda ab: right(ab) * bad)
    with pytest.raises(microbench.WrongKernelError):
        microbench.check("swiglu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["swiglu", "relu"], None, 1.0), "no op is called 'relu'; choose from attention, cross_entropy, rms_norm"),
        ((["swiglu"], None, 0.0), "seconds must be positive, got 0.0"),
        ((["swiglu"], 0, 1.0), "threads must be between 1 and 1024, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    before = _C.num_threads(), torch.get_num_threads()
    with pytest.raises(ValueError, match=message):
        microbench.run(*arguments, as_json=False)
    assert (_C.num_threads(), torch.get_num_threads()) == before


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_machine_limits_do_what_they_say(isa):
    """The limits are only limits if the kernels read all, copy all and compute all that they are counted for."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        source = torch.randint(-8, 9, (3 * _C.stream_block + 77,)).float()
        sums = torch.full((4,), torch.nan)
        _C.stream_read(source, sums)
        assert torch.equal(sums, torch.stack([block.sum() for block in source.split(_C.stream_block)]))
        target = torch.full_like(source, torch.nan)
        _C.stream_copy(source, target)
        assert torch.equal(target, source)
        totals = torch.full((3,), torch.nan)
        _C.multiply_add(totals, 50)
        x = 0.0
        for _ in range(50):
            x = x * 0.999 + 0.001
        assert torch.allclose(totals, torch.full((3,), _C.multiply_add_width * x), rtol=1e-5)
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.stream_read(torch.ones(4), torch.ones(2)), "sums must be of size 1"),
        (lambda: _C.stream_copy(torch.ones(4), torch.ones(5)), "target must be of the shape of source"),
        (lambda: _C.multiply_add(torch.ones(4), 0), "rounds must be at least 1, got 0"),
    ],
)
def test_machine_limits_refuse_bad_operands(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", microbench.op_names())
def test_work_counts_at_least_the_operands(name):
    """Forward reads every input and writes every output once, apart from what attention may skip."""
    page = microbench._page(name)
    for dtype in microbench.DTYPES.values():
        for case in page.cases(dtype):
            outputs = microbench._as_tuple(getattr(page, name)(**case))
            forward, backward = page.work(case), page.work(case, backward=True)
            assert forward["bytes"] >= sum(out.nbytes for out in outputs)
            assert backward["bytes"] >= forward["bytes"]
            assert backward["flops"] >= forward["flops"] > 0


def test_work_of_attention_counts_visible_pairs():
    case = {
        "q": torch.ones(5, 2, 8),
        "k": torch.ones(5, 2, 8),
        "mask": PackedMask(torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)),
    }
    pairs = (1 + 2) + (2 + 2 + 3)
    assert microbench._page("attention").work(case)["flops"] == 4 * pairs * 2 * 8


def test_peers_are_right():
    """An op is not to be compared with something that computes something else."""
    for name in microbench.op_names():
        page = microbench._page(name)
        if hasattr(page, "peer"):
            case = list(page.cases())[-1]
            ours, theirs = getattr(page, name)(**case), page.peer(**case)
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_picture(report, tmp_path, figures):
    plots.ops(report, tmp_path / "ops.png")
    lines = report["ops"]
    limit, peer = figures[0].axes
    names = list(dict.fromkeys(f"{line['op']} {line['direction']}" for line in lines))
    assert [tick.get_text() for tick in limit.get_yticklabels()] == names
    assert sorted(bar.get_width() for bar in peer.patches) == sorted(line["times_torch"] for line in lines)
    faster = sum(line["times_torch"] > 1 for line in lines)
    assert figures[0].get_suptitle() == f"{faster} of {len(lines)} kernels are faster than plain torch"


def test_missing_matplotlib_names_the_extra(report, tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install hrmcore[bench]")):
        plots.ops(report, tmp_path / "ops.png")


def test_memory_without_proc_and_without_the_free_pages_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(machine.Path, "exists", lambda _: False)
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": os.sysconf_names["SC_PHYS_PAGES"]})
    assert machine.available_memory(torch.device("cpu")) == pages * size
