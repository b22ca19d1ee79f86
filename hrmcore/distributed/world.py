"""Several processes train one model (`torchrun --nproc-per-node N -m hrmcore train run.toml`).

Each rank takes its share of every packed batch, and gradients are summed over the ranks. The loss is divided by the
supervised tokens of all ranks: a step computes what one process would, up to the order of the sums. Each rank holds the
whole model, or its shard of it (`fsdp.py`). Numbers and CPU tensors travel over gloo, CUDA tensors over NCCL.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hrmcore import _C
from hrmcore.ops.backend import require_cuda


class World:
    """The processes of a run, as torchrun's environment names them; one process alone when it names none.

    Every rank must call the same methods in the same order. They raise ConnectionError when another rank has ended.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Meet the other ranks; `device` ("cpu", "cuda", for one process alone "cuda:N") is what this one computes on.

        Whoever has called torch.distributed.init_process_group before has chosen what the tensors travel over.
        Raises ValueError when the environment names only a part of what that takes, or when there is no such device.
        """
        self.device = _device_of_rank(device)
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if self.ranks > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank() if self.ranks > 1 else 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes: metrics, states, the checkpoint."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the other ranks."""
        if self.ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def group(self) -> dist.ProcessGroup | None:
        """Another group of the same ranks, for what runs beside the steps; None for one process alone."""
        return dist.new_group(backend="gloo") if self.ranks > 1 else None

    def sum(self, number: float) -> float:
        """The sum of the ranks' numbers, in float64; the same bits on each of them."""
        if self.ranks == 1:
            return number
        total = torch.tensor([number], dtype=torch.float64)
        self._reduce([total])
        return float(total)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum each parameter's gradient in place; None stays None where no rank has one."""
        if self.ranks == 1:
            return
        everything = list(parameters)
        holders = torch.tensor([parameter.grad is not None for parameter in everything], dtype=torch.int32)
        self._reduce([holders])
        held = [parameter for parameter, count in zip(everything, holders.tolist(), strict=True) if count]
        for parameter in held:
            if parameter.grad is None:  # a rank without a record
                parameter.grad = torch.zeros_like(parameter)
        self._reduce([parameter.grad for parameter in held if parameter.grad is not None])

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the other ranks enter only after rank 0 has left it."""
        if not self.is_main:
            self.sum(0)
        yield
        if self.is_main:
            self.sum(0)

    def assert_same_on_all_ranks(self, text: str) -> None:
        """Raise ValueError on every rank when their texts or instruction sets differ: weights would drift apart."""
        if self.ranks == 1:
            return
        sha256 = hashlib.sha256(f"{_C.isa()} {text}".encode())
        digest = torch.from_numpy(np.frombuffer(sha256.digest(), np.uint8).astype(np.int32))
        extremes = torch.cat([digest, -digest])
        self._reduce([extremes], dist.ReduceOp.MAX)
        if not torch.equal(extremes[: len(digest)], -extremes[len(digest) :]):
            raise ValueError(
                f"rank {self.rank} of {self.ranks}: the ranks differ in their run file, data or newest state, or in "
                f"their instruction set (here {_C.isa()}; HRMCORE_ISA sets it); all need the same files and one shared "
                "run folder"
            )

    def _reduce(self, tensors: list[Tensor], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        try:
            works = [dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors]
            for work in works:
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise lost_rank(f"rank {self.rank} of {self.ranks}", error) from None


def lost_rank(where: str, error: RuntimeError) -> ConnectionError:
    """What to raise for an error of torch.distributed: another rank has ended."""
    reason = str(error).splitlines()[0].split(". ")[0]
    return ConnectionError(
        f"{where}: another process of this run has ended or cannot be reached; its own message says why ({reason})"
    )


def _device_of_rank(device: str) -> torch.device:
    """The CPU, or the GPU that is named or of this process's number on its machine; it becomes the current one."""
    if device == "cpu":
        return torch.device("cpu")
    try:
        require_cuda()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    count, named = torch.cuda.device_count(), device.removeprefix("cuda").removeprefix(":")
    if named and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"device {device!r}: each of several processes takes a GPU of its own; give 'cuda'")
    number = int(named or os.environ.get("LOCAL_RANK", "0"))
    if number >= count and named:
        raise ValueError(f"device {device!r}: this machine has {count} GPUs, numbered from 0")
    if number >= count:
        raise ValueError(
            f"device 'cuda': process {number} of this machine has no GPU, for there are {count}; start {count}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
