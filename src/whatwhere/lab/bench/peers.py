"""Other people's PoPE, imported only when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from whatwhere.lab.bench.cases import RefusedError, Side, Tensors, Work

# Module and what pip calls it.
PEERS = {
    "PoPE-pytorch": ("PoPE_pytorch", "PoPE-pytorch==0.2.1"),
    "x-transformers": ("x_transformers", "x-transformers==2.31.10"),
}


def missing() -> list[str]:
    """A line for each peer that cannot be imported, with what would bring it."""
    lines = []
    for name, (module, package) in PEERS.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            why = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
            lines.append(f"{name} cannot be imported{why}: pip install {package}")
    return lines


def build(side: Side, tensors: Tensors) -> Work:
    """Make a peer ready for a case, with our frequencies and phases.

    Raises:
        RefusedError: If it is not installed.
    """
    module, package = PEERS[side.backend]
    try:
        theirs = importlib.import_module(module)
    except ModuleNotFoundError:
        raise RefusedError(f"not installed: pip install {package}") from None
    except Exception as error:
        # Whatever a peer raises when it is imported, the other sides are measured.
        raise RefusedError(f"cannot be imported: {type(error).__name__}: {error}") from None
    make = _pope_pytorch if side.backend == "PoPE-pytorch" else _x_transformers
    return make(theirs, tensors)


def _finish(tensors: Tensors, call: Any, learned: Tensor, square: bool) -> Work:
    from whatwhere.lab.bench.sides import sequence_work

    case = tensors.case
    if case.stage == "decode":

        def run() -> Tensor:
            with torch.no_grad():
                out: Tensor = call(tensors.q, tensors.k, tensors.v)
                return out

        work = Work(run, lambda: {"out": run()}, cache_numbers=2 * case.head_dim)
    else:
        work = sequence_work(tensors, call, learned)
    work.feature_dim, work.square = 2 * case.head_dim, square
    return work


def _pope_pytorch(theirs: Any, tensors: Tensors) -> Work:
    """Fused on a GPU, unfused on a CPU, as it chooses itself; positions encoded beforehand."""
    case = tensors.case
    module = theirs.PoPE(case.head_dim, heads=case.heads).to(case.device)
    module.bias.data.copy_(_delta(tensors))
    causal = case.causal and case.stage != "decode"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = theirs.flash_attn_with_pope(
            q, k, v, pos_emb=module(case.length), causal=causal
        )
        return out

    return _finish(tensors, call, module.bias, case.device == "cpu")


def _x_transformers(theirs: Any, tensors: Tensors) -> Work:
    """What its attention layer does between its projections, at the scale of everyone else."""
    case = tensors.case
    inner = importlib.import_module("x_transformers.x_transformers")
    attend = importlib.import_module("x_transformers.attend").Attend(
        causal=case.causal and case.stage != "decode",
        flash=True,
        scale=case.head_dim**-0.5,
        heads=case.heads,
    )
    polar = inner.PolarEmbedding(case.head_dim, case.heads).to(case.device)
    polar.learned_bias.data.copy_(_delta(tensors)[:, None])
    at = torch.arange(case.length, device=case.device)
    group = case.heads // case.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        freqs, bias = polar(at)
        # Its bias is one of keys for every query head, so that grouped ones must be repeated.
        keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        queries = inner.apply_polar_pos_emb(q, freqs)
        keys = inner.apply_polar_pos_emb(keys, freqs + bias)
        out: Tensor = attend(queries, keys, values)[0]
        return out

    work = _finish(tensors, call, polar.learned_bias, True)
    inner_results = work.results
    assert inner_results is not None

    def results() -> dict[str, Tensor]:
        found = dict(inner_results())
        if "delta" in found:
            found["delta"] = found["delta"][:, 0]
        return found

    work.results = results
    return work


def _delta(tensors: Tensors) -> Tensor:
    delta = tensors.encoding("pope").delta
    assert isinstance(delta, Tensor)
    return delta.detach()
