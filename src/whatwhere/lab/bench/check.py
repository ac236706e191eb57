"""Outputs and gradients against float64, before anything is timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

import whatwhere as ww
from whatwhere.lab.bench.cases import Case, Origin, Tensors

# Of `error`. Rounding the operands once costs a third of these or less; TF32 in place of
# float32 costs three times the first.
TOLERANCE = {"fp32": 1e-4, "fp16": 6e-3, "bf16": 4e-2}
# Of peers, whose angles are formed in float32 and drift with position: a finding of the error
# column, not a reason to leave their speed unknown.
PEER_TOLERANCE = 1e-2

# Scores of a block of the float64 reference: a gibibyte or so of intermediates.
_SCORES = 2**24


def truth(tensors: Tensors, encoding: str) -> dict[str, Tensor]:
    """Output and gradients in float64, of the heads that share the last key head.

    Heads do not see one another, so that those of one key head stand for all; the last is where
    a wrong stride shows. Query rows are taken in blocks, so that no ``T x S`` matrix is held.

    Args:
        tensors: Inputs of the case.
        encoding: A name in `whatwhere.ENCODINGS`.

    Returns:
        float64 ``out`` ``(B, H/G, T, V)`` and, where the case has a backward pass, ``q``, ``k``,
        ``v`` in the shapes of their slices and ``delta`` ``(H/G, R)`` if there is one.
    """
    case = tensors.case
    backward = case.stage == "forward+backward"
    given = copy.deepcopy(tensors.encoding(encoding)).double()
    parts = slices(tensors, {"q": tensors.q, "k": tensors.k, "v": tensors.v})
    parts["slope"] = slices(tensors, {"out": tensors.slope})["out"]
    exact = {name: x.detach().double() for name, x in parts.items()}
    leaves = {name: exact[name].requires_grad_(backward) for name in ("q", "k", "v")}
    spec = _last_heads(given(tensors.q.device), case)
    if spec.phase is not None:
        phase = spec.phase.detach().requires_grad_(backward)
        spec = ww.ScoreSpec(**{**vars(spec), "phase": phase})
        leaves["delta"] = phase
    outputs = []
    grads = {name: torch.zeros_like(x) for name, x in leaves.items()} if backward else {}
    rows = max(1, _SCORES // (exact["q"].shape[1] * case.length))
    for b in range(case.batch):
        for start in range(0, case.queries, rows):
            stop = min(start + rows, case.queries)
            out = _block(exact, spec, case, b, slice(start, stop))
            outputs.append(out.detach())
            if backward:
                flow = exact["slope"][b : b + 1, :, start:stop]
                found = torch.autograd.grad(out, list(leaves.values()), flow)
                for total, grad in zip(grads.values(), found, strict=True):
                    total += grad
    shape = (case.batch, exact["q"].shape[1], case.queries, case.head_dim)
    per_batch = [
        torch.cat(outputs[i : i + len(outputs) // case.batch], dim=2)
        for i in range(0, len(outputs), len(outputs) // case.batch)
    ]
    return {"out": torch.cat(per_batch).view(shape), **grads}


def allowed(case: Case, origin: Origin) -> float:
    """Largest `error` of a side that counts as right."""
    return max(TOLERANCE[case.dtype], PEER_TOLERANCE if origin == "peer" else 0.0)


def slices(tensors: Tensors, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of results in full, the part that `truth` gives."""
    group = tensors.case.heads // tensors.case.kv_heads
    part = {}
    for name, x in found.items():
        if name == "delta":
            part[name] = x[-group:]
        else:
            part[name] = x[:, -group:] if name in ("q", "out") else x[:, -1:]
    return part


def error(tensors: Tensors, found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest error of a row of the output or of a gradient, relative to that row.

    Rows shorter than the root mean square of all count as long as that: some are zero. A row
    matters for itself, since at the end of a long sequence all of them are small.

    Returns:
        The error; infinite where a result is missing, has another shape or is not finite.
    """
    part = slices(tensors, found)
    worst = 0.0
    for name, wanted in right.items():
        if name not in part or part[name].shape != wanted.shape:
            return float("inf")
        lengths = wanted.norm(dim=-1)
        floor = lengths.square().mean().sqrt()
        off = ((part[name].double() - wanted).norm(dim=-1) / lengths.clamp(min=floor)).max()
        worst = max(worst, off.item() if off.isfinite() else float("inf"))
    return worst


def _last_heads(spec: ww.ScoreSpec, case: Case) -> ww.ScoreSpec:
    group = case.heads // case.kv_heads
    fields = dict(vars(spec))
    for name in ("phase", "slopes"):
        if fields[name] is not None:
            fields[name] = fields[name][-group:].double()
    return ww.ScoreSpec(**fields)


def _block(
    exact: Mapping[str, Tensor], spec: ww.ScoreSpec, case: Case, b: int, rows: slice
) -> Tensor:
    device = exact["q"].device
    first = case.length - case.queries
    return ww.attention(
        exact["q"][b : b + 1, :, rows],
        exact["k"][b : b + 1],
        exact["v"][b : b + 1],
        spec,
        causal=case.causal,
        query_positions=torch.arange(first + rows.start, first + rows.stop, device=device),
        key_positions=torch.arange(case.length, device=device),
        backend="reference",
    )
