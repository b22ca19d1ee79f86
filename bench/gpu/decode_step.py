"""The fused decode step beside the CPU engine: the embedded model's greedy tokens in bfloat16, one after the other.

    python -m bench.gpu.decode_step --tokens 64              on the first CUDA device, else in the emulator
    python -m bench.gpu.decode_step --form graph --blocks 4  a launch a phase; the grid

Both get the CPU's tokens, so that every step is compared. A token is decided where the CPU's best logit leads the next
by more than the error allowed, 2e-2 of the logits' norm. Prints one line of JSON; exits with 1 when a decided token
differs or an error is larger. The emulator takes about a second a token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import hrmcore
from hrmcore import _C
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.cuda_decode import CudaStep, Form
from hrmcore.engine.engine import EMBEDDED_MODEL
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

ALLOWED = 2e-2
QUESTION = "What is 17 plus 25?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--form", choices=("persistent", "graph"), default="persistent")
    parser.add_argument("--blocks", type=int, default=0, help="the grid; 0: a block a multiprocessor, 2 when emulated")
    options = parser.parse_args()
    blocks = options.blocks or (0 if torch.cuda.is_available() else 2)
    found = compare(options.tokens, blocks, options.form)
    print(json.dumps(found))
    return int(found["error"] > ALLOWED or found["same_where_decided"] != found["decided"])


def compare(tokens: int, blocks: int, form: Form = "persistent") -> dict[str, float]:
    """Decode so many tokens on both; the largest error in norm, and how many tokens are the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = hrmcore.load()
    assert engine.tokenizer is not None
    ids = engine.tokenizer.prompt(QUESTION, "direct")
    cpu = CpuRunner.from_checkpoint(EMBEDDED_MODEL, "bfloat16", None, 1, 0)
    handles, logits = cpu.open([ids], [len(ids)])
    model = HRM.from_pretrained(EMBEDDED_MODEL).float()
    kv, table = prefilled(model, ids, len(ids) + tokens)
    step = CudaStep(model.to(device), form, blocks)
    kv, table = kv.to(device), table.to(device)
    agreement = Agreement()
    for position in range(len(ids), len(ids) + tokens):
        token = int(logits[0].argmax())
        logits = cpu.step(handles, [token])
        theirs = torch.from_numpy(logits[0])
        numbers = (torch.tensor([n], dtype=torch.int32, device=device) for n in (token, position))
        with emulated() if device == "cpu" else contextlib.nullcontext():
            ours = step(*numbers, table, kv)[0].cpu()
        agreement.add(ours, theirs)
    return asdict(agreement)


@dataclass
class Agreement:
    """How far one model's logits are from another's, over the tokens of one sequence."""

    tokens: int = 0
    error: float = 0.0  # the largest, in norm
    same: int = 0
    decided: int = 0
    same_where_decided: int = 0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Logits (V) of the next token; theirs decide."""
        norm = float(theirs.norm())
        best, next_best = theirs.topk(2).values.tolist()
        agrees, leads = bool(ours.argmax() == theirs.argmax()), best - next_best > ALLOWED * norm
        self.tokens += 1
        self.error = max(self.error, float((ours - theirs).norm()) / norm)
        self.same += agrees
        self.decided += leads
        self.same_where_decided += agrees and leads


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Kernels for CUDA run in the tests' emulator in this context."""
    _C.emulate_cuda(str(Path(_C.__file__).with_name("_C_emulated.so")))
    try:
        yield
    finally:
        _C.emulate_cuda("")


def prefilled(model: HRM, ids: list[int], room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache in bfloat16 that holds ids, all of them a prefix, with room for more; and its table (1, C)."""
    runner = TorchRunner(model)
    handles, _ = runner.open([ids], [len(ids)])
    runner.reserve(handles, room - len(ids))
    return runner.kv.bfloat16(), runner.page_tables(handles)


if __name__ == "__main__":
    sys.exit(main())
