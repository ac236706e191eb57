"""Backend ``cpu``: attention by blocks of query rows, in plain PyTorch.

PyTorch's fused CPU kernel wants values as wide as the widened features and so computes a third of
its products on zeros, and a mask of any other kind than causality makes it a dense one. Here a
block of rows of several heads is one batched product with the keys that some row sees. The passes
are operators of their own, so that `torch.compile` calls them without a break.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.cpu.decode import FEW, attend_few, attend_one, decode, takes_one
from whatwhere.attention.cpu.rows import EagerRows, rows_forward
from whatwhere.spec import ScoreSpec


def refuses(call: Call) -> str | None:
    """What it does not do: other devices."""
    if call.q.device.type != "cpu":
        return f"it runs on a CPU, the call is on {call.q.device.type}"
    return None


def run(call: Call) -> Tensor:
    """Hand the call to the operators, raw."""
    spec = call.spec
    turning = None
    if spec.inv_freq is not None and spec.num_turning:
        turning = spec.inv_freq[:, : spec.num_turning].to(call.q.device)
    few = call.q.shape[2] <= FEW and not call.needs_grad
    if torch.compiler.is_compiling():
        function: Callable[..., Tensor] = decode if few else rows_forward
    else:
        function = attend_few if few else EagerRows.apply
    return function(
        call.q,
        call.k,
        call.v,
        _keepable(turning),
        spec.phase if turning is not None else None,
        _keepable(spec.slopes),
        None if call.in_order else _keepable(call.query_positions),
        None if call.in_order else _keepable(call.key_positions),
        _keepable(call.key_mask),
        _keepable(call.key_segments),
        spec.feature,
        spec.magnitude,
        spec.num_frequencies,
        spec.scale,
        spec.temperature_length or 0,
        call.causal,
        call.window or 0,
        spec.softcap or 0.0,
    )


def _keepable(x: Tensor | None) -> Tensor | None:
    """What a backward pass may keep: tensors made in inference mode may not be."""
    if x is None or torch.compiler.is_compiling() or not x.is_inference():
        return x
    return x if torch.is_inference_mode_enabled() else x.clone()


def reads_raw_keys(spec: ScoreSpec, device: torch.device) -> bool:
    """Polar keys on a CPU: half the numbers to read outweighs turning them."""
    return device.type == "cpu" and spec.feature == "polar"


BACKEND = Backend(run=run, refuses=refuses, reads_raw_keys=reads_raw_keys)

__all__ = ["BACKEND", "attend_one", "reads_raw_keys", "refuses", "run", "takes_one"]
