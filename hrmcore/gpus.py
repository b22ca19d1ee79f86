"""GPUs as their makers describe them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine: `peak` in dense bfloat16 FLOP/s, `memory` in bytes."""

    name: str
    peak: float
    memory: float


GPUS = {
    device.name: device
    for device in (
        # Peaks are bfloat16 tensor core rates without sparsity, accumulated in float32. A rate stated with sparsity is
        # halved, one in FP8 halved again, in FP4 once more; so does float32 accumulation on GeForce.
        Device("A100", 312e12, 80e9),  # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM
        Device("H100", 989.4e12, 80e9),  # NVIDIA H100 Tensor Core GPU architecture white paper, SXM5: half of 1,978.9
        Device("H200", 989.4e12, 141e9),  # NVIDIA H200 Tensor Core GPU data sheet, SXM: half of 1,979
        # NVIDIA DGX B200 data sheet, an eighth: 72 PFLOPS in FP8 with sparsity, 1,440 GB
        Device("B200", 2250e12, 180e9),
        Device("RTX4090", 165.2e12, 24e9),  # NVIDIA Ada GPU architecture white paper
        Device("RTX5090", 209.5e12, 32e9),  # NVIDIA RTX Blackwell white paper: 3,352 TFLOPS in FP4 with sparsity
    )
}
