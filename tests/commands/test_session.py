"""Sessions of the prompt: answers, slash commands, and one line for every mistake."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.screen import Screen, session_of

from hrmcore.commands.options import printable
from hrmcore.commands.session import COMMANDS, Session, _count
from hrmcore.data.records import Rejected, read_records
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.engine import Engine, load

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_answer_streams_and_its_speed_is_noted_dimly(session: Session, screen: Screen, engine: Engine) -> None:
    assert session.handle("  what is 3 plus 4? \n")
    answer, note, _ = screen.take().rsplit("\n", 2)
    assert answer == printable(engine.generate("what is 3 plus 4?", max_new_tokens=12))
    assert re.fullmatch(r"\x1b\[2m12 tokens, \d+ tokens/s, cut at max_new_tokens\x1b\[0m", note)


def test_no_color_is_respected(session: Session, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Screen()
    session_of(engine, out).handle("é")
    assert "12 tokens" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9b\x7f\n\té") == "a\ufffd[2Jb\ufffd\ufffd\ufffd\ufffd\n\té"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/condition shout", "unknown condition 'shout'; this tokenizer has: direct, cot, synth, noisy"),
        ("/temperature warm", "temperature must be a number of 0 or more, as in /temperature 0.7, got 'warm'"),
        ("/temperature -1", "temperature must be 0 or more, got -1.0"),
        ("/seed x", "seed must be a whole number of at least 0, or none, as in /seed 1, got 'x'"),
        ("/seed -1", "seed must be a whole number of at least 0, got -1"),
        ("/save", "/save needs a file"),
        ("/save here", "there is no answer to save yet"),
        ("/samples 3", "sample must be a number from 1 to 2, got 3"),
        ("/samples x", "sample must be a number from 1 to 2, got 'x'"),
        ("/temperatur 1", "unknown command /temperatur: did you mean /temperature?"),
        ("/home is where?", "unknown command /home: see /help, or begin with a space"),
        ("1 " * 3000, "the prompt has"),
    ],
)
def test_a_mistake_is_explained_in_one_line(session: Session, screen: Screen, line: str, message: str) -> None:
    before = dict(session.options)
    assert session.handle(line)
    shown = screen.take()
    assert shown.startswith(f"! {message}")
    assert shown.count("\n") == 1
    assert session.options == before
    assert session.complaints == 1


def test_options_are_set_and_shown(session: Session, screen: Screen, engine: Engine) -> None:
    for line in ("/condition cot, synth", "/temperature 1.5", "/seed 7"):
        assert session.handle(line)
    assert screen.take() == ("condition: cot, synth (known: direct, cot, synth, noisy)\ntemperature: 1.5\nseed: 7\n")
    session.handle("é")
    expected = engine.generate("é", max_new_tokens=12, condition="cot, synth", temperature=1.5, seed=7)
    assert screen.take().startswith(printable(expected) + "\n")
    for line in ("/condition", "/temperature", "/seed none"):
        session.handle(line)
    assert "temperature: 1.5\nseed: none\n" in screen.take()
    assert session.complaints == 0


def test_a_leading_space_asks_a_question_that_starts_with_a_slash(
    session: Session, screen: Screen, engine: Engine
) -> None:
    session.handle(" /help")
    assert screen.take().startswith(printable(engine.generate("/help", max_new_tokens=12)) + "\n")


def test_blank_input_does_nothing_and_quit_leaves(session: Session, screen: Screen) -> None:
    assert session.handle("  \n")
    assert screen.take() == ""
    assert not session.handle("/quit")


def test_help_lists_every_command(session: Session, screen: Screen) -> None:
    session.handle("/help")
    listed = re.findall(r"^(/\w+)", screen.take(), re.MULTILINE)
    assert listed == list(COMMANDS)
    assert {"/condition", "/temperature", "/seed", "/model", "/save", "/samples", "/help", "/quit"} == set(listed)


def test_saved_answers_can_be_read_as_records(session: Session, screen: Screen, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    session.handle("copy\n1 2")
    session.handle("/condition cot")
    session.handle("é")
    session.handle(f"/save {path}")
    assert screen.take().endswith(f"saved 2 answers to {path}\n")
    records = list(read_records(path, Rejected(), strict=True))
    assert [(r.instruction, r.condition) for r in records] == [("copy\n1 2", "direct"), ("é", "cot")]
    assert records[1].response == session.engine.generate("é", max_new_tokens=12, condition="cot").strip()

    session.handle("é")
    session.handle(f"/save {path}")  # its own file it may write again
    assert len(list(read_records(path, Rejected(), strict=True))) == 3
    (tmp_path / "other").write_text("mine")
    session.handle(f"/save {tmp_path / 'other'}")
    assert "exists already" in screen.take()
    assert (tmp_path / "other").read_text() == "mine"
    session.handle(f"/save {tmp_path / 'no' / 'folder'}")
    assert screen.take().startswith("! [Errno 2]")


def test_another_model_is_loaded_or_the_old_one_stays(engine: Engine, screen: Screen, tmp_path: Path) -> None:
    session = Session(lambda name: engine if name is None else load(name), None, {"max_new_tokens": 3}, screen)
    session.handle(f"/model {tmp_path / 'none'}")
    assert screen.take() == f"! {tmp_path / 'none'}: no such folder\n"
    assert session.engine is engine
    other = tmp_path / "other"
    shutil.copytree(engine.source, other)
    (other / "samples.json").unlink()
    session.handle(f"/model {other}")
    assert session.engine is not engine
    assert screen.take().startswith(f"{other}: ")
    session.handle("/model")
    session.handle("/samples")
    assert screen.take() == f"model: {other} ({other})\n{other} has no sample questions.\n"
    (other / "samples.json").write_text('[{"task": "x"}]')
    session.handle(f"/model {other}")
    assert (
        screen.take() == f"! {other / 'samples.json'}: expected a list of objects with task, instruction and response\n"
    )


def test_a_model_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        session_of(Engine(CpuRunner.from_checkpoint(checkpoint, "auto", None, 1, 0), None, checkpoint))


def test_the_introduction_tells_what_to_try(session: Session, screen: Screen) -> None:
    session.introduce()
    shown = screen.take()
    assert shown.startswith("the embedded model: ")
    assert "a context of 2048 tokens" in shown
    assert "It answers: chain sum, grid\n" in shown
    assert "   1  what is 3 plus 4?\n   2  copy …\n" in shown


def test_samples_are_listed_and_asked(session: Session, screen: Screen, engine: Engine) -> None:
    session.handle("/samples")
    assert screen.take() == " 1  chain_sum: what is 3 plus 4?\n 2  grid: copy …\n"
    session.handle("/samples 2")
    shown = screen.take()
    answer = printable(engine.generate("copy\n1 2\n3 4", max_new_tokens=12))
    assert shown.startswith(f"copy\n1 2\n3 4\n{answer}\n")
    assert shown.endswith("expected:\n1 2\n3 4\n")


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (51_234, "51.2 k"), (2_500_000, "2.5 M"), (1_180_000_000, "1.18 B")]
)
def test_sizes_are_readable(number: int, text: str) -> None:
    assert _count(number) == text
