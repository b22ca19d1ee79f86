"""The checks of bench/gpu/checklist.py that ask what holds on: many requests, no memory left, several processes.

Without a GPU their logic runs on the CPU: few requests through the CPU engine, allocations that are made to fail, two
processes over gloo.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.checks import Here, WrongError
from hrmcore.data.packing import PackedBatch
from hrmcore.distributed.world import World
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.engine import EMBEDDED_MODEL, MAX_BATCH, Engine, load
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer

REQUESTS, FEW_REQUESTS = 10_000, 60
TOKENS = 24  # of an answer
GROWN_HOST = 8 << 20  # bytes: 10,000 requests that each leave a kilobyte behind would be more
GROWN_DEVICE = 1 << 20


class Soak:
    """Requests to one engine, a third of which are left before they end; every answer is compared."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self.requests = self.left = self.wrong = 0
        self._chance = random.Random(seed)
        words = ("lantern ", "tree ", "29 + 36 = ")
        self.prompts = [f"Spell this word backward: {words[n % 3] * (1 + n)}" for n in range(12)]
        self.alone = [engine.generate(prompt, max_new_tokens=TOKENS) for prompt in self.prompts]

    def fill(self) -> None:
        """As many requests together as there can be: from here on no cache needs to grow."""
        longest = [self.prompts[-1]] * MAX_BATCH
        self._check([11] * MAX_BATCH, self.engine.generate(longest, max_new_tokens=TOKENS))

    def run(self, count: int) -> None:
        """So many requests: in batches, and one by one."""
        until = self.requests + count
        while self.requests < until:
            kind = self._chance.choice([self._batch, self._leave, self._forget])
            kind(until - self.requests)

    def _batch(self, most: int) -> None:
        picked = [self._chance.randrange(len(self.prompts)) for _ in range(min(16, most))]
        self._check(picked, self.engine.generate([self.prompts[i] for i in picked], max_new_tokens=TOKENS))

    def _check(self, picked: list[int], answers: list[str]) -> None:
        self.requests += len(picked)
        self.wrong += sum(self.alone[i] != answer for i, answer in zip(picked, answers, strict=True))

    def _leave(self, most: int) -> None:
        for index in self._some(min(8, most)):
            answer = self.engine.stream(self.prompts[index], max_new_tokens=TOKENS)
            shown = "".join(piece for piece, _ in zip(answer, range(self._chance.randrange(1, 5)), strict=False))
            answer.close()
            self.wrong += not self.alone[index].startswith(shown)

    def _forget(self, most: int) -> None:
        for index in self._some(min(8, most)):
            cycle: list[object] = [self.engine.stream(self.prompts[index], max_new_tokens=TOKENS)]
            next(cycle[0], None)  # type: ignore[call-overload]
            cycle.append(cycle)
        del cycle
        gc.collect()

    def _some(self, count: int) -> list[int]:
        self.requests += count
        self.left += count
        return [self._chance.randrange(len(self.prompts)) for _ in range(count)]


def memory(device: str) -> dict[str, int]:
    """Bytes that this process holds, on the host and in torch's tensors on the device."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {"host": pages * resource.getpagesize()}
    if device != "cpu":
        torch.cuda.synchronize()
        held |= {"device": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return held


def soak(here: Here) -> dict[str, Any]:
    """10,000 requests through `load(device="cuda")`, many of them cancelled: right answers, and memory that is flat."""
    count = FEW_REQUESTS if here.emulated else REQUESTS
    crowd = Soak(load(device=here.device))
    crowd.fill()
    crowd.run(count // 5)
    before = memory(here.device)
    crowd.run(count - count // 5)
    after = memory(here.device)
    grown = {name: after[name] - before[name] for name in before}
    if crowd.wrong:
        raise WrongError(f"{crowd.wrong} of {crowd.requests} answers are not what the prompt gets alone")
    if crowd.engine.open_requests:
        raise WrongError(f"{crowd.engine.open_requests} requests are still open")
    if grown["host"] > GROWN_HOST or grown.get("device", 0) > GROWN_DEVICE:
        raise WrongError(f"memory grew by {grown} bytes in {count - count // 5} requests")
    return {"requests": crowd.requests, "cancelled": crowd.left, "held": after, "grown": grown}


class _NoMemory(TorchDispatchMode):
    """Every operation of torch finds no memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has none.")


@contextlib.contextmanager
def no_memory(here: Here) -> Iterator[None]:
    """Nothing more can be allocated on the device in this context."""
    if here.emulated:
        with _NoMemory():
            yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def expect_memory_error(what: str, work: Callable[[], object], kind: type[BaseException]) -> str:
    """The one line of the error that must come."""
    try:
        work()
    except kind as error:
        said = " ".join(str(error).split())
        if not said:
            raise WrongError(f"{what}: an error that says nothing") from None
        return said[:200]
    raise WrongError(f"{what}: there was no memory, and no error came")


def out_of_memory(here: Here) -> dict[str, Any]:
    """No memory in a prefill, in decoding and in a training step: one clear error, and the engine goes on."""
    model = HRM.from_pretrained(EMBEDDED_MODEL).requires_grad_(False).to(here.device)
    runner = TorchRunner(model) if here.emulated else CudaRunner(model)
    engine = Engine(runner, Tokenizer.load(EMBEDDED_MODEL), EMBEDDED_MODEL)
    question = "What is 3 + 4?"
    expected = engine.generate(question, max_new_tokens=4)
    figures: dict[str, Any] = {}

    def still_right(what: str) -> None:
        if engine.open_requests or engine.generate(question, max_new_tokens=4) != expected:
            raise WrongError(f"after {what} without memory the engine is not what it was")

    with no_memory(here):
        long = question * 60
        figures["prefill"] = expect_memory_error("a prefill", lambda: engine.generate(long), MemoryError)
    still_right("a prefill")
    ids = [1] * 50
    tokens = engine.tokens(ids, max_new_tokens=engine.config.context - len(ids), ignore_eos=True)
    next(tokens)
    with no_memory(here):
        figures["decoding"] = expect_memory_error("decoding", lambda: list(tokens), MemoryError)
    tokens.close()
    still_right("decoding")
    figures["training"] = _train_without_memory(here)
    return figures


def _train_without_memory(here: Here) -> str:
    """A training run meets it in its third step; then it goes on from its state to the end."""
    with tempfile.TemporaryDirectory() as place:
        run_file = write_run(Path(place), here.device, steps=4, save_every=1)
        plain, calls = HRM.loss, [0]

        def loss(self: HRM, batch: PackedBatch, *args: Any, **options: Any) -> Any:
            calls[0] += 1
            with no_memory(here) if calls[0] == 3 else contextlib.nullcontext():
                return plain(self, batch, *args, **options)

        from hrmcore.train.run_file import read_config
        from hrmcore.train.trainer import Trainer

        HRM.loss = loss  # type: ignore[method-assign]
        try:
            trainer = Trainer(read_config(run_file))
            said = expect_memory_error("a training step", trainer.run, torch.OutOfMemoryError)
        finally:
            HRM.loss = plain  # type: ignore[method-assign]
        trainer.close()
        Trainer(read_config(run_file)).run()
        if [row["step"] for row in metrics(run_file)] != [1, 2, 3, 4]:
            raise WrongError(f"the run did not go on: {metrics(run_file)}")
    return said


RUN = """
train_files = ["{folder}/train.jsonl"]
tokenizer = "{folder}/tokenizer"
out = "{folder}/out"
device = "{device}"
steps = {steps}
save_every = {save_every}
batch_tokens = 256
seed = 7
[model]
hidden_size = 32
intermediate_size = 64
num_layers_per_stack = 1
num_attention_heads = 2
head_dim = 16
max_position_embeddings = 64
"""


def write_run(folder: Path, device: str, steps: int, save_every: int = 1000) -> Path:
    """A run file for a toy, with its records and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]
    records = [{"instruction": f"repeat {a} {b}", "response": f"{a} {b}"} for a in words for b in words]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(EMBEDDED_MODEL / "tokenizer.model", folder / "tokenizer")
    path = folder / "run.toml"
    path.write_text(RUN.format(folder=folder, device=device, steps=steps, save_every=save_every))
    return path


def metrics(run_file: Path) -> list[dict[str, Any]]:
    """The rows that a run has written."""
    return [json.loads(line) for line in (run_file.parent / "out/metrics.jsonl").read_text().splitlines()]


def ranks(here: Here) -> dict[str, Any]:
    """One process over NCCL, and two on one GPU over gloo, train the curve of one process without either."""
    with tempfile.TemporaryDirectory() as place:
        kinds = {"alone": (1, ""), "one": (1, "gloo" if here.emulated else "cpu:gloo,cuda:nccl"), "two": (2, "gloo")}
        curves = {}
        for name, (count, backend) in kinds.items():
            run_file = write_run(Path(place) / name, here.device, steps=3)
            if backend:
                run_ranks(run_file, count, backend, here.device)
            else:
                train_as_rank(str(run_file), backend, here.device)
            curves[name] = [(row["tokens"], row["loss"]) for row in metrics(run_file)]
    for name in ("one", "two"):
        for (tokens, loss), (same, expected) in zip(curves[name], curves["alone"], strict=True):
            if tokens != same or not abs(loss - expected) <= 1e-5 * abs(expected):
                raise WrongError(f"{name}: {curves[name]}, alone {curves['alone']}")
    backends = [backend for _, backend in kinds.values() if backend]
    return {"steps": len(curves["alone"]), "last_loss": curves["alone"][-1][1], "backends": backends}


def run_ranks(run_file: Path, count: int, backend: str, device: str) -> None:
    """Train a run file in so many processes, which all use the first GPU. Raises WrongError with what one says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bench.gpu.endurance", str(run_file), backend, device]
    given = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            command, env={**given, "RANK": str(rank), "LOCAL_RANK": "0"}, cwd=root, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=200)[1] for process in processes]
    except subprocess.TimeoutExpired:
        raise WrongError(f"{count} processes over {backend or 'nothing'} did not end in 200 seconds") from None
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise WrongError(f"{count} processes over {backend or 'nothing'}: {text[-1000:]}")


def train_as_rank(run_file: str, backend: str, device: str) -> None:
    """One of the processes. With a backend even a process alone sends its sums through it."""
    from hrmcore.train.run_file import read_config
    from hrmcore.train.trainer import Trainer

    if backend:
        if device == "cuda":
            torch.cuda.set_device(0)
        dist.init_process_group(backend)
        for name in ("sum", "sum_gradients", "assert_same_on_all_ranks"):
            setattr(World, name, _without_shortcut(getattr(World, name)))
        _check_sums(World(device))
    Trainer(read_config(run_file)).run()
    if backend and dist.is_initialized():
        dist.destroy_process_group()


def _without_shortcut(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of World that takes one process for several: it does not return early."""

    def through_the_backend(world: World, *arguments: Any) -> Any:
        ranks, world.ranks = world.ranks, max(world.ranks, 2)
        try:
            return method(world, *arguments)
        finally:
            world.ranks = ranks

    return through_the_backend


def _check_sums(world: World) -> None:
    """The collectives that training uses, on tensors of the device."""
    count = dist.get_world_size()
    holders = [torch.nn.Parameter(torch.zeros(1000, device=world.device)) for _ in range(3)]
    for n, parameter in enumerate(holders[:2]):
        parameter.grad = torch.full_like(parameter, n + 1.0)
    world.sum_gradients(holders)
    found = [None if parameter.grad is None else float(parameter.grad.sum()) for parameter in holders]
    if found != [1000.0 * count, 2000.0 * count, None] or world.sum(1.5) != 1.5 * count:
        raise WrongError(f"sums over {count} processes are {found}")
    world.assert_same_on_all_ranks("the same")


CHECKS: dict[str, Callable[[Here], dict[str, Any]]] = {
    "soak": soak,
    "out_of_memory": out_of_memory,
    "ranks": ranks,
}


if __name__ == "__main__":
    train_as_rank(*sys.argv[1:])
