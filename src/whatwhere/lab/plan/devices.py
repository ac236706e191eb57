"""What a device can do at the most, as its maker says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device that is for sale.

    Attributes:
        title: Its own name, as PyTorch gives it.
        memory: GB (10^9 bytes) that it is sold with.
        bf16: Dense bfloat16 TFLOPS of its matrix units.
        fp32: float32 TFLOPS without TF32, which PyTorch leaves off.
    """

    title: str
    memory: float | None
    bf16: float | None
    fp32: float | None

    @property
    def kind(self) -> str:
        """PyTorch's name for devices of this kind."""
        return "cpu" if self.bf16 is None else "cuda"


DEVICES = {
    "a100": Device("NVIDIA A100-SXM4-80GB", 80, 312, 19.5),
    "a100-40gb": Device("NVIDIA A100-SXM4-40GB", 40, 312, 19.5),
    "h100": Device("NVIDIA H100 80GB HBM3", 80, 989, 67),
    "h200": Device("NVIDIA H200", 141, 989, 67),
    "b200": Device("NVIDIA B200", 180, 2250, 75),
    "l40s": Device("NVIDIA L40S", 48, 362, 91.6),
    "rtx-4090": Device("NVIDIA GeForce RTX 4090", 24, 165, 82.6),
    "cpu": Device("CPU", None, None, None),
}
"""Figures of NVIDIA's data sheets (SXM modules where there are several)."""
