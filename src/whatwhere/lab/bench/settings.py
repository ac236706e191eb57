"""What a measurement is asked for, and the cases that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Literal

import torch

import whatwhere as ww
from whatwhere.lab.bench.cases import Case, Stage
from whatwhere.lab.bench.step import models


@dataclass(frozen=True)
class Settings:
    """Options of `whatwhere bench`; what is left out follows from the device."""

    what: Literal["attention", "decode", "step"] = "attention"
    """attention (passes over a sequence), decode (one query, a cache) or step (of training)"""
    device: Literal["cpu", "cuda"] | None = None
    """where; the GPU if there is one"""
    against: Literal["peers"] | None = None
    """peers: PoPE-pytorch and x-transformers take part"""
    output: Path | None = None
    """folder for bench.csv and figures; measured rows that it holds are not measured again"""
    calibrate: bool = False
    """write which backend is fastest where into the user's table of choices"""
    lengths: tuple[int, ...] = ()
    """tokens, or keys for decode; CPU 1024 2048 (8192 32768), GPU 1000 to 65536 (to 131072)"""
    batch: tuple[int, ...] = ()
    """sequences; CPU 4 (decode 1), GPU 16384 tokens in all (decode 1 8 64)"""
    heads: int | None = None
    """query heads; CPU 8, GPU 2048 / head-dim"""
    kv_heads: tuple[int, ...] = ()
    """key heads; as many as query heads, on a GPU an eighth too"""
    head_dim: tuple[int, ...] = ()
    """channels of a head; CPU 64, GPU 64 128"""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """CPU fp32, GPU bf16"""
    threads: tuple[int, ...] = (1,)
    """threads of a CPU"""
    rounds: int | None = None
    """interleaved rounds; CPU 9, GPU 25"""
    causal: bool = False
    """causal passes; the default on a CPU, on a GPU with --full"""
    full: bool = False
    """passes in which every query sees every key"""
    passes: tuple[Literal["forward", "forward+backward"], ...] = ("forward", "forward+backward")
    """of attention"""
    encodings: tuple[str, ...] = ("pope",)
    """names in whatwhere.ENCODINGS; rope is the baseline"""
    backends: tuple[str, ...] = ()
    """names in whatwhere.BACKENDS, or auto; all that take a call, but the reference"""
    model: str | None = None
    """shape of a step's model, from whatwhere.models.PRESETS; quick on a CPU, 124m on a GPU"""
    memory: bool = True
    """measure peak memory too (on a CPU in a process for each side)"""
    seed: int = 0
    """of tensors, phases and weights"""

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ValueError: In one line that names the option.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: there is no GPU that PyTorch can use")
        if self.rounds is not None and self.rounds < 2:
            raise ValueError(f"rounds: expected at least 2, got {self.rounds}")
        for name in ("lengths", "batch", "kv_heads", "head_dim", "threads"):
            if any(n < 1 for n in getattr(self, name)):
                raise ValueError(f"{name.replace('_', '-')}: expected positive integers")
        if any(dim % 2 for dim in self.head_dim):
            raise ValueError(f"head-dim: expected even numbers, got {self.head_dim}")
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads: expected at least 1, got {self.heads}")
        _known("encodings", self.encodings, list(ww.ENCODINGS))
        _known("backends", self.backends, ["auto", *ww.BACKENDS])
        if self.calibrate and self.what != "attention":
            raise ValueError(f"calibrate: measures attention, not {self.what}")
        for case in self.cases():
            if case.heads % case.kv_heads:
                raise ValueError(
                    f"kv-heads: {case.heads} heads are no multiple of {case.kv_heads}"
                )
        if self.what == "step" and self.model is not None:
            _known("model", (self.model,), list(models()))

    @property
    def where(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def count(self) -> int:
        """Rounds."""
        return self.rounds or (25 if self.where == "cuda" else 9)

    def cases(self) -> list[Case]:
        """Every case, short ones first."""
        found = self._steps() if self.what == "step" else self._passes()
        return sorted(found, key=lambda case: case.length)

    def _passes(self) -> Iterator[Case]:
        gpu, decode = self.where == "cuda", self.what == "decode"
        stages: Sequence[Stage] = ("decode",) if decode else self.passes
        usual: tuple[int, ...] = (8192, 32768) if decode else (1024, 2048)
        if gpu:
            usual = (8192, 32768, 131072) if decode else (1000, 1024, 4096, 4097, 16384, 65536)
        masks = [m for m, wanted in ((True, self.causal), (False, self.full)) if wanted]
        if decode or not masks:
            masks = [True, False] if gpu and not decode else [True]
        dims = self.head_dim or ((64, 128) if gpu else (64,))
        for length, dim, causal, stage, threads in product(
            self.lengths or usual, dims, masks, stages, (0,) if gpu else self.threads
        ):
            heads = self.heads or (max(1, 2048 // dim) if gpu else 8)
            usual_batch: tuple[int, ...] = (1, 8, 64) if gpu and decode else (1 if decode else 4,)
            if gpu and not decode:
                usual_batch = (max(1, 16384 // length),)
            groups = self.kv_heads or ((heads, heads // 8) if gpu and heads % 8 == 0 else (heads,))
            for batch, kv_heads in product(self.batch or usual_batch, groups):
                yield Case(
                    stage, batch, heads, kv_heads, length, dim, self._dtype, causal, threads,
                    self.where, self.seed,
                )  # fmt: skip

    def _steps(self) -> Iterator[Case]:
        gpu = self.where == "cuda"
        model = self.model or ("124m" if gpu else "quick")
        for length, threads in product(
            self.lengths or ((1024,) if gpu else (128,)), (0,) if gpu else self.threads
        ):
            for batch in self.batch or ((max(1, 16384 // length),) if gpu else (32,)):
                yield Case(
                    "step", batch, 1, 1, length, 2, self._dtype, True, threads, self.where,
                    self.seed, model,
                )  # fmt: skip

    @property
    def _dtype(self) -> str:
        return self.dtype or ("bf16" if self.where == "cuda" else "fp32")


def _known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{option}: unknown {name!r}{hint}: expected some of {', '.join(known)}"
            )
