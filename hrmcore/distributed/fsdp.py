"""FSDP2 on the model: each rank holds its shard of every weight, and so of the gradients, the optimizer and the EMA.

A block is visited several times in a step. Its weights are gathered at its first visit and stay gathered until
`reshard` at the step's end. That is one gather a step; giving them back after every visit would take a gather for
each visit of the forward pass and of the backward pass. Gradients are reduced to their shards after each visit that
carries some. No gradient is therefore held whole for longer than its block's backward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hrmcore.averages import local
from hrmcore.data.packing import BatchStream, PackedBatch, pack
from hrmcore.data.records import Corpus
from hrmcore.distributed.world import World
from hrmcore.model import HRM, Block


def shard(model: HRM, world: World, precision: str) -> None:
    """Cut every parameter along its first dimension, one shard a rank; gradients will be sums over the ranks.

    With `precision` bfloat16 the blocks' weights are gathered in it and their gradients summed in float32. The
    embedding and the head stay float32, as they do in one process. An optimizer must be made after this.
    """
    model.shares_weights = False
    mesh = init_device_mesh(model.lm_head.weight.device.type, (world.ranks,))
    # Casting inputs would round the table of rotations as well.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in (*blocks, model):
        policy = half if precision == "bfloat16" and module is not model else MixedPrecisionPolicy()
        fsdp = fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        fsdp.set_reshard_after_backward(False, recurse=False)
        # The loss is already divided by all ranks' supervised tokens: gradients are summed, not averaged.
        fsdp.set_gradient_divide_factor(1.0)
        fsdp.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "greedy_tokens"):
        register_fsdp_forward_method(model, method)


def reshard(model: HRM) -> None:
    """Free the gathered weights; the parameters are this rank's shards again.

    Call this before anything changes the parameters: gathered copies do not follow the change.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gradient_norm(parameters: Iterable[Tensor], world: World) -> float:
    """The norm of the gradients over all ranks' shards."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients)).tolist() if gradients else []
    return math.sqrt(world.sum(sum(norm**2 for norm in norms)))


def dummy_batch(corpus: Corpus, batch: PackedBatch) -> PackedBatch:
    """A batch for a rank that gets no record of `batch`: the shortest of the records, unsupervised.

    Its loss and its gradients are 0, but with it the rank takes part in every gather and every sum.
    """
    shortest = min(batch.records, key=lambda record: int(corpus.offsets[record + 1] - corpus.offsets[record]))
    packed = pack(corpus, [shortest], BatchStream.MULTIPLE)
    return dataclasses.replace(packed, supervised=packed.supervised[:0], targets=packed.targets[:0], records=())


@torch.no_grad()
def gathered(model: HRM, world: World, dtype: torch.dtype) -> HRM | None:
    """The whole model in `dtype` on the CPU of rank 0; None on the other ranks, which must call this as well.

    One tensor at a time is gathered in float32.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            weights[name] = whole.to("cpu", dtype)
    if not world.is_main:
        return None
    with torch.device("meta"):
        copy = HRM(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy
