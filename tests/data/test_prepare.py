"""`hrmcore prepare`: the store holds what tokenising in memory gives, whatever the number of workers or a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import reasoning_gym
import torch
from pyarrow import parquet

from hrmcore.cli import main
from hrmcore.commands.prepare import parse_caps, summary
from hrmcore.data import prepare as prepare_module
from hrmcore.data.packing import pack
from hrmcore.data.prepare import prepare, stratified
from hrmcore.data.records import Corpus, Rejected, read_records, tokenize
from hrmcore.data.store import open_store, verify
from hrmcore.tokenizer import Tokenizer, train_tokenizer
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

CONTEXT = 256
BROKEN = "not JSON: expecting property name enclosed in double quotes"  # the first of these
BAD_LINES = [
    "{",
    '{"instruction": "a", "response": " "}',
    '{"instruction": "a", "response": "b", "condition": "loud"}',
    '{"instruction": "' + "a " * 600 + '", "response": "b"}',
    '{"instruction": "\\ud800 é", "response": "b"}',
]


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def problems(task: str, size: int) -> list[dict[str, str]]:
    conditions = ("direct", "cot", "direct, noisy")
    dataset = reasoning_gym.create_dataset(task, size=size, seed=5)
    return [
        {"instruction": item["question"], "response": item["answer"], "condition": conditions[i % 3]}
        for i, item in enumerate(dataset)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("records")
    return [write(folder / f"{task}.jsonl", problems(task, 90)) for task in ("spell_backward", "gcd", "chain_sum")]


@pytest.fixture(scope="module")
def tokenizer(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((r.instruction for file in files for r in read_records(file, Rejected())), folder, vocab_size=400)
    return folder


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred records make many batches."""
    monkeypatch.setattr(prepare_module, "_BATCH_LINES", 7)


def in_memory(files: list[Path], tokenizer: Path, context: int = CONTEXT) -> Corpus:
    rejected = Rejected()
    records = (record for file in files for record in read_records(file, rejected))
    return tokenize(records, Tokenizer.load(tokenizer), context, rejected)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sequences(corpus: Corpus) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(corpus.tokens), corpus.offsets[1:-1])]


def test_a_store_is_the_corpus_in_memory(files: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    store = prepare(files, tmp_path / "store", tokenizer=tokenizer, context=CONTEXT, workers=1)
    expected = in_memory(files, tokenizer)
    assert store.corpus.tokens.dtype == np.uint16
    for name in ("tokens", "offsets", "prefix"):
        assert np.array_equal(getattr(store.corpus, name), getattr(expected, name)), name
    chosen = [5, 0, 250]
    for ours, theirs in zip(
        vars(pack(store.corpus, chosen)).values(), vars(pack(expected, chosen)).values(), strict=True
    ):
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    assert (store.folder / "tokenizer" / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    verify(store.folder)


@pytest.mark.usefixtures("small_batches")
def test_a_parquet_file_makes_the_store_of_its_records(files: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    path = tmp_path / files[0].with_suffix(".parquet").name
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    stores = [
        prepare([file], tmp_path / str(n), tokenizer=tokenizer, context=CONTEXT, workers=n)
        for n, file in enumerate((files[0], path), start=1)
    ]
    assert sequences(stores[1].corpus) == sequences(stores[0].corpus)
    (source,) = stores[1].manifest["sources"].values()
    assert source["read"] == len(rows)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source["files"] == [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}]


@pytest.mark.usefixtures("small_batches")
def test_the_bytes_are_the_same_for_any_number_of_workers(files: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    stores = [
        contents(prepare(files, tmp_path / str(n), tokenizer=tokenizer, context=60, caps={"gcd": 40}, workers=n).folder)
        for n in (1, 3)
    ]
    assert stores[0] == stores[1]
    assert stores[0].keys() == {"tokens.npy", "offsets.npy", "prefix.npy", "tokenizer/tokenizer.model", "manifest.json"}


def test_the_manifest_accounts_for_every_line(files: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(files[0].read_text(encoding="utf-8") + "".join(line + "\n" for line in BAD_LINES), encoding="utf-8")
    store = prepare(
        [bad, files[1]], tmp_path / "store", tokenizer=tokenizer, context=CONTEXT, caps={"bad": 31}, workers=1
    )
    source = store.manifest["sources"]["bad"]
    assert (source["read"], source["kept"], source["beyond_cap"]) == (95, 31, 59)
    assert sorted(source["left_out"].values()) == [1, 1, 1, 1, 1]
    assert source["left_out_examples"][BROKEN] == ["bad.jsonl:91:2"]
    assert store.manifest["sources"]["gcd"]["kept"] == 90
    assert store.manifest["records"] == len(store.corpus) == 121
    assert sum(store.manifest["conditions"].values()) == 121
    assert store.manifest["tokens"] == len(store.corpus.tokens)
    assert store.manifest["longest"] == store.corpus.lengths.max()
    text = "\n".join(summary(store))
    assert "bad: 31 of 95 records kept" in text
    assert "59 left out: beyond the cap of 31" in text
    assert "1 left out: unknown condition 'loud'" in text
    assert "gcd: 90 of 90 records kept" in text


@pytest.mark.parametrize("workers", [1, 2])
def test_the_summary_names_what_beside_the_usual_keys_was_used_and_what_not(
    workers: int, files: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": "Spell", "input": f"word {i}" * (i % 2), "response": "d", "id": str(i)} for i in range(50)]
    path = write(tmp_path / "alpaca.jsonl", rows)
    store = prepare([path, files[0]], tmp_path / "store", tokenizer=tokenizer, context=CONTEXT, workers=workers)
    source = store.manifest["sources"]["alpaca"]
    assert (source["joined_keys"], source["unused_keys"]) == ({"input": 25}, {"id": 50})
    lines = summary(store)
    assert lines[:3] == [
        "alpaca: 50 of 50 records kept",
        "  25 have 'input': it follows the instruction after a blank line",
        "  not used: 'id' (50)",
    ]
    ids = Tokenizer.load(tokenizer)
    assert sequences(store.corpus)[1][: store.corpus.prefix[1]] == ids.prompt("Spell\n\nword 1")


@pytest.mark.parametrize("number", range(len(BAD_LINES)))
def test_strict_makes_a_bad_line_fatal(
    number: int, files: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(files[1].read_text(encoding="utf-8") + BAD_LINES[number] + "\n", encoding="utf-8")
    arguments = ["prepare", str(path), "--tokenizer", str(tokenizer), "--context", str(CONTEXT), "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "store"), "--strict"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"hrmcore prepare: {path}:91:")
    assert list(tmp_path.iterdir()) == [path]
    assert main([*arguments, "--out", str(tmp_path / "store")]) == 0
    assert "bad: 90 of 91 records kept" in capsys.readouterr().out


def test_a_cap_keeps_whole_records_in_order_and_each_condition_its_share(
    files: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    def prepared(seed: int) -> Any:
        out = tmp_path / f"store{seed}"
        return prepare(files, out, tokenizer=tokenizer, context=CONTEXT, caps={"gcd": 30}, seed=seed, workers=1)

    store = prepared(0)
    everything = sequences(in_memory(files, tokenizer))
    kept = sequences(store.corpus)
    assert len(kept) == 90 + 30 + 90
    assert (kept[:90], kept[-90:]) == (everything[:90], everything[-90:])
    rest = iter(everything[90:180])
    assert all(record in rest for record in kept[90:120])  # a subsequence: the order is the file's
    assert store.manifest["conditions"] == {"direct": 70, "cot": 70, "direct, noisy": 70}
    assert sequences(prepared(1).corpus) != kept


def test_a_sample_is_spread_evenly() -> None:
    strata = np.repeat([1, 0, 2], [600, 300, 100])
    counts = np.zeros(1000)
    for seed in range(400):
        chosen = stratified(strata, 100, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == 100
        assert (np.diff(chosen) > 0).all()
        assert np.bincount(strata[chosen]).tolist() == [30, 60, 10]
        counts[chosen] += 1
    assert abs(counts[:500].sum() - counts[500:].sum()) == 0
    # each record is drawn with probability 0.1: 40 times of 400, with a standard deviation of 6
    assert counts.mean() == 40
    assert counts.min() > 40 - 5 * 6
    assert counts.max() < 40 + 5 * 6


def test_a_new_tokenizer_comes_with_the_store(files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(line + "\n" for line in BAD_LINES), encoding="utf-8")
    store = prepare([*files, bad], tmp_path / "store", new_tokenizer=400, context=1024, workers=1)
    tokenizer = Tokenizer.load(store.folder / "tokenizer")
    assert store.manifest["vocab_size"] == tokenizer.vocab_size == 400
    first = next(read_records(files[0], Rejected()))
    assert tokenizer.decode(sequences(store.corpus)[0]) == first.instruction + first.response


def test_a_new_tokenizer_sees_every_nth_record_of_much_text(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(file.stat().st_size for file in files)
    monkeypatch.setattr(prepare_module, "_TOKENIZER_BYTES", size // 3 + 1)
    everything = [record for file in files for record in read_records(file, Rejected())]
    assert list(prepare_module._texts(files)) == [t for r in everything[::3] for t in (r.instruction, r.response)]


def test_training_from_a_store_is_training_from_its_records(
    files: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = prepare(files, tmp_path / "store", tokenizer=tokenizer, context=CONTEXT, workers=1).folder

    def run_file(train: str, heldout: str, folder: str, context: int = CONTEXT) -> Path:
        path = tmp_path / f"{folder}.toml"
        path.write_text(
            f"""train_files = {train}
heldout_files = {heldout}
tokenizer = "{tokenizer}"
out = "{tmp_path / folder}"
steps = 3
batch_tokens = 512
[model]
hidden_size = 16
intermediate_size = 32
num_layers_per_stack = 1
num_attention_heads = 1
head_dim = 16
max_position_embeddings = {context}
""",
            encoding="utf-8",
        )
        return path

    names = json.dumps([str(file) for file in files])
    trainers = []
    from_store = run_file(f'["{store}"]', f'["{store}/"]', "b")
    from_store.write_text(from_store.read_text().replace(f'tokenizer = "{tokenizer}"\n', ""))  # the store's own
    for path in (run_file(names, names, "a"), from_store):
        trainers.append(Trainer(read_config(path)))
        trainers[-1].run()
    assert all(map(torch.equal, trainers[0].model.parameters(), trainers[1].model.parameters()))
    losses = [
        [json.loads(line)["heldout_loss"] for line in (tmp_path / x / "metrics.jsonl").read_text().splitlines()[-1:]]
        for x in "ab"
    ]
    assert losses[0] == losses[1]

    named = run_file(f'["{store}"]', "[]", "g")
    named.write_text(named.read_text().replace(f'tokenizer = "{tokenizer}"', f'tokenizer = "{store}"'))
    assert read_config(named).tokenizer == str(store / "tokenizer")
    capsys.readouterr()
    assert main(["train", str(named)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"next: hrmcore repl {tmp_path / 'g' / 'checkpoint'}"

    def refusal(path: Path) -> str:
        capsys.readouterr()
        assert main(["train", str(path)]) == 2
        return capsys.readouterr().err

    assert "a store stands alone" in refusal(run_file(f'["{store}", "{files[0]}"]', "[]", "c"))
    assert "prepare with --context 16" in refusal(run_file(f'["{store}"]', "[]", "d", context=16))
    assert "not a store" in refusal(run_file(f'["{tokenizer}"]', "[]", "e"))
    train_tokenizer(["other words"], tokenizer.with_name("other"), vocab_size=290)
    path = run_file(f'["{store}"]', "[]", "f")
    path.write_text(path.read_text().replace(str(tokenizer), str(tokenizer.with_name("other"))))
    assert f"set tokenizer to {store}/tokenizer" in refusal(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE"], "one of the arguments --tokenizer --new-tokenizer is required"),
        (["FILE", "--tokenizer", "TOKENIZER", "--new-tokenizer", "300"], "not allowed with"),
        (["missing.jsonl", "--tokenizer", "TOKENIZER"], "missing.jsonl: No such file"),
        (["FILE", "FILE", "--tokenizer", "TOKENIZER"], "is given twice"),
        (["FILE", "--tokenizer", "nowhere"], "nowhere: no tokenizer.model and no tokenizer.json"),
        (["FILE", "--tokenizer", "TOKENIZER", "--cap", "gcd"], "--cap must be NAME=N"),
        (["FILE", "--tokenizer", "TOKENIZER", "--cap", "gcd=0"], "--cap must be NAME=N"),
        (["FILE", "--tokenizer", "TOKENIZER", "--cap", "lcm=3"], "--cap names 'lcm', but the sources are gcd"),
        (["FILE", "--tokenizer", "TOKENIZER", "--cap", "gcd=3", "--cap", "gcd=4"], "--cap names 'gcd' twice"),
        (["FILE", "--tokenizer", "TOKENIZER", "--context", "0"], "context must be at least 1, got 0"),
        (["FILE", "--tokenizer", "TOKENIZER", "--workers", "0"], "workers must be at least 1, got 0"),
        (["FILE", "--tokenizer", "TOKENIZER", "--context", "2"], "no usable record: gcd: 90 left out: longer than"),
        (["FILE", "--new-tokenizer", "20"], "tokenizer: "),
        (["FILE", "--tokenizer", "TOKENIZER", "--out", "TOKENIZER"], "exists already"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    files: list[Path],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"FILE": str(files[1]), "TOKENIZER": str(tokenizer)}
    given = ["prepare", "--out", str(tmp_path / "store"), "--workers", "1", *(words.get(a, a) for a in arguments)]
    try:
        status = main(given)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("hrmcore prepare: ")
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_leaves_nothing(
    files: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ["prepare", *map(str, files), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "store")]
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tokenizer / "tokenizer.model").stat().st_size, before[1]))
    try:
        status = main([*arguments, "--workers", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "File too large" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_caps_may_name_sources_with_an_equals_sign() -> None:
    assert parse_caps(["a=b=3", "c=4"]) == {"a=b": 3, "c": 4}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_prepare_that_is_stopped_leaves_no_store_and_no_process(
    sent: signal.Signals, files: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    lines = files[0].read_bytes()
    endless = tmp_path / "endless.jsonl"
    os.mkfifo(endless)  # a file that never ends: the stop comes in the middle, however slow the machine is
    arguments = ["prepare", str(endless), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "store")]
    command = [sys.executable, "-m", "hrmcore", *arguments, "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    tokens = tmp_path / "store.partial" / "tokens.npy"
    pipe = os.open(endless, os.O_RDWR | os.O_NONBLOCK)  # a reader too, so that it outlives the first look at the file
    try:
        while not tokens.exists() or tokens.stat().st_size < 100_000:
            assert process.poll() is None
            try:
                os.write(pipe, lines)
            except BlockingIOError:
                time.sleep(0.01)
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        process.wait(timeout=60)
    finally:
        os.close(pipe)
    deadline = time.monotonic() + 60
    while (left := group_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert not (tmp_path / "store").exists()
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path / "store")
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert not (tmp_path / "store.partial").exists()
        assert process.stderr is not None
        assert not re.search(rb"Traceback", process.stderr.read())


def group_of(leader: int) -> list[int]:
    """The processes of a process group that have not ended."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == leader and state != "Z":
                alive.append(int(entry.name))
    return alive


def test_a_cap_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--cap gcd=0 leaves no record; it must be at least 1"):
        prepare([tmp_path / "gcd.jsonl"], tmp_path / "store", tokenizer=tmp_path, caps={"gcd": 0})


@pytest.mark.parametrize("count", [2, 40, 3000])
def test_a_tokenizer_of_a_size_that_fits_however_little_text_there_is(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("".join(f'{{"instruction": "q{i % 7}", "response": "{i}"}}\n' for i in range(count)))
    assert main(["prepare", str(file), "--new-tokenizer", "auto", "--out", str(tmp_path / "store")]) == 0
    tokenizer = Tokenizer.load(tmp_path / "store/tokenizer")
    assert tokenizer.decode(tokenizer.encode("q3 41")) == "q3 41"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(file), "--new-tokenizer", "few", "--out", str(tmp_path / "other")])
    assert "must be a whole number of at least 1, or auto, got 'few'" in capsys.readouterr().err
