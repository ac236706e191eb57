"""What is measured: a case (shape, pass, device), the sides that compete in it, its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import whatwhere as ww

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Stage = Literal["forward", "forward+backward", "decode", "step"]
Origin = Literal["stock", "ours", "peer"]

# Options without which an encoding cannot be made, and a training length that suits all.
_NEEDED: dict[str, dict[str, Any]] = {"yarn": {"factor": 4.0}}
_SHORTEST = 128


class RefusedError(Exception):
    """A side cannot take a case; the message says why in a few words."""


@dataclass(frozen=True)
class Case:
    """One setting in which all sides are timed in the same rounds.

    Attributes:
        stage: The pass that is timed.
        batch: ``B``.
        heads: ``H``.
        kv_heads: ``G``.
        length: ``T = S``; for decoding ``S``, with one query; for a step tokens of a sequence.
        head_dim: ``D = V``.
        dtype: Name in `DTYPES`; for a step the dtype of autocast, ``fp32`` being none.
        causal: Whether keys after a query are hidden.
        threads: Of a CPU; 0 on a GPU.
        device: ``"cpu"`` or ``"cuda"``.
        seed: Of tensors and phases.
        model: For a step, the shape of the model.
    """

    stage: Stage
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str
    causal: bool
    threads: int
    device: str
    seed: int
    model: str = ""

    @property
    def queries(self) -> int:
        """``T``."""
        return 1 if self.stage == "decode" else self.length

    def __str__(self) -> str:
        if self.stage == "step":
            return f"step of {self.model}, {self.batch} x {self.length} tokens, {self.dtype}"
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return (
            f"{self.stage}, (B, H, {'S' if self.stage == 'decode' else 'T'}, D) = ({self.batch}, "
            f"{heads}, {self.length}, {self.head_dim}), {self.dtype}, "
            f"{'causal' if self.causal else 'full'}"
            + (f", {self.threads} thread(s)" if self.threads else "")
        )


@dataclass(frozen=True)
class Side:
    """What competes: an encoding computed in one way.

    Attributes:
        encoding: A name in `whatwhere.ENCODINGS`.
        backend: A backend of ours, a kernel of PyTorch, or a peer.
        origin: Which of the three.
    """

    encoding: str
    backend: str
    origin: Origin

    @property
    def name(self) -> str:
        """Unique within a case."""
        return f"{self.encoding} {self.backend}"


@dataclass
class Work:
    """A side, ready to be timed in a case.

    Attributes:
        run: What is timed.
        results: Output and, where there are any, gradients, by name, for the check; ``None`` if
            the work brings its own check.
        error: That check: largest error, and whether it is within bounds.
        feature_dim: Width of the features of its score; 0 where that says nothing.
        cache_numbers: Numbers it keeps per token and key head; 0 where nothing is kept.
        chosen: Whether ``"auto"`` would take this backend.
        square: Whether it writes a ``T x S`` matrix of every head.
    """

    run: Callable[[], Any]
    results: Callable[[], Mapping[str, Tensor]] | None = None
    error: Callable[[], tuple[float, bool]] | None = None
    feature_dim: int = 0
    cache_numbers: int = 0
    chosen: bool = False
    square: bool = False


@dataclass
class Tensors:
    """Inputs of a case, the same for every side.

    Attributes:
        q: ``(B, H, T, D)``, laid out as a model makes them: heads behind positions.
        k: ``(B, G, S, D)``, likewise.
        v: ``(B, G, S, D)``, likewise.
        slope: ``(B, H, T, D)``, gradient of the output.
        encodings: Encodings made so far, by name.
        caches: Keys and values of decoding made so far, by what they hold.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor
    encodings: dict[str, ww.Encoding] = field(default_factory=dict)
    caches: dict[str, Tensor] = field(default_factory=dict)

    def encoding(self, name: str) -> ww.Encoding:
        """The encoding of this name, its phases drawn from inside their bounds."""
        if name not in self.encodings:
            case = self.case
            made = ww.make(
                name,
                head_dim=case.head_dim,
                num_heads=case.heads,
                train_length=max(case.length, _SHORTEST),
                **_NEEDED.get(name, {}),
            )
            draw = torch.Generator().manual_seed(case.seed)
            for key, parameter in made.named_parameters():
                if key.endswith("delta"):
                    start = torch.rand(parameter.shape, generator=draw)
                    parameter.data.copy_(-0.01 - (2 * math.pi - 0.02) * start)
            self.encodings[name] = made.to(case.device)
        return self.encodings[name]

    @torch.no_grad()
    def cache(self, encoding: str | None) -> tuple[Tensor, Tensor]:
        """Keys (of an encoding, or raw) and values as a cache holds them; sides share them."""
        kept, what = self.caches, encoding or "raw keys"
        if "values" not in kept:
            kept["values"] = self.v.contiguous()
        if what not in kept:
            keys = self.k
            if encoding is not None:
                at = torch.arange(keys.shape[2], device=keys.device)
                keys = ww.encode_keys(keys, self.encoding(encoding)(keys.device), at)
            kept[what] = keys.contiguous()
        return kept[what], kept["values"]


def make_tensors(case: Case) -> Tensors:
    """Draw the inputs of a case, from its seed."""
    draw = torch.Generator(case.device).manual_seed(case.seed)

    def drawn(heads: int, length: int) -> Tensor:
        sizes = (case.batch, length, heads, case.head_dim)
        x = torch.randn(sizes, generator=draw, device=case.device, dtype=torch.float32)
        return x.to(DTYPES[case.dtype]).transpose(1, 2)

    backward = case.stage == "forward+backward"
    q = drawn(case.heads, case.queries).requires_grad_(backward)
    k = drawn(case.kv_heads, case.length).requires_grad_(backward)
    v = drawn(case.kv_heads, case.length).requires_grad_(backward)
    return Tensors(case, q, k, v, drawn(case.heads, case.queries))


def cache_bytes(case: Case, work: Work) -> int:
    """Bytes that a side keeps per token, keys and values of all key heads; 0 but for decoding."""
    return work.cache_numbers * case.kv_heads * DTYPES[case.dtype].itemsize


def limit(case: Case, feature_dim: int) -> float | None:
    """What the ratio to RoPE would be if nothing but the necessary counted.

    For passes over a sequence matrix products: with features ``F`` and values ``V`` wide, a
    forward pass is ``F + V`` per score, a backward pass ``3 F + 2 V`` (scores, dQ and dK; dP and
    dV). For decoding the numbers of a cache that holds ``D`` wide keys, whatever the features: 1.

    Args:
        case: The case.
        feature_dim: ``F``.

    Returns:
        The ratio, or ``None`` for a step, most of which is not attention.
    """
    dim = case.head_dim
    if not feature_dim or case.stage == "step":
        return None
    if case.stage == "decode":
        return 1.0
    if case.stage == "forward":
        return (feature_dim + dim) / (dim + dim)
    return (4 * feature_dim + 3 * dim) / (4 * dim + 3 * dim)
