"""Context parallelism: several processes share the positions of each sequence.

Each process computes its own positions of everything that works on tokens one by one. Attention
gathers the keys and values of all positions, one layer at a time, and attends from its own
queries. What a position sees and how it scores is as without; only the order of sums differs.

Process `c` of `C` has the chunks `c` and `2C - 1 - c` of `2C`: an early one, whose queries see
few keys, and a late one, whose queries see many, so that all processes have the same work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from whatwhere.attention import attention
from whatwhere.spec import ScoreSpec


@dataclass(frozen=True, eq=False)
class ContextShard:
    """The positions of this process.

    Args:
        group: The processes that share each sequence.
        length: ``T``, positions of a whole sequence; a multiple of twice the processes.

    Raises:
        ValueError: If the length does not divide.
    """

    group: dist.ProcessGroup
    length: int

    def __post_init__(self) -> None:
        check_length(self.length, self.group.size())

    @property
    def chunks(self) -> tuple[slice, slice]:
        """The early and the late positions of this process."""
        rank, size = self.group.rank(), self.group.size()
        width = self.length // (2 * size)
        late = 2 * size - 1 - rank
        return (
            slice(rank * width, (rank + 1) * width),
            slice(late * width, (late + 1) * width),
        )

    def take(self, whole: Tensor, dim: int = -1) -> Tensor:
        """The part of this process, of a tensor that has all ``T`` positions along ``dim``."""
        if whole.shape[dim] != self.length:
            raise ValueError(
                f"expected {self.length} positions along dimension {dim}, got {tuple(whole.shape)}"
            )
        parts = [whole.narrow(dim, c.start, c.stop - c.start) for c in self.chunks]
        return torch.cat(parts, dim=dim)

    def gather(self, part: Tensor) -> Tensor:
        """``(B, G, T / C, D)`` of each process to ``(B, G, T, D)`` in order, in all of them.

        Its gradient goes back to the process that each position belongs to, summed.
        """
        every = _all_gather(part, self.group)
        early, late = every.chunk(2, dim=-2)
        ordered = torch.cat((early, late.flip(0)))
        return ordered.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: ScoreSpec,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        window: int | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Causal attention of this process's queries over the keys of all processes.

        Each chunk of queries attends to the keys up to its end, of which its own are the last:
        no positions, and no mask over all keys, need be given.

        Args:
            q: ``(B, H, T / C, D)``.
            k: ``(B, G, T / C, D)``.
            v: ``(B, G, T / C, V)``.
            spec: Of the layer's encoding.
            positions: ``(B, T)``, where they are not 0..T-1.
            segments: ``(B, T)`` documents of all positions.
            window: See `whatwhere.attention`.
            backend: See there.

        Returns:
            ``(B, H, T / C, V)``.
        """
        # One message in place of two.
        both = self.gather(torch.cat((k, v), dim=-1))
        keys, values = both.split((k.shape[-1], v.shape[-1]), dim=-1)
        outs = []
        for chunk, queries in zip(self.chunks, q.chunk(2, dim=2), strict=True):
            seen = slice(0, chunk.stop)
            more: dict[str, Any] = {}
            if segments is not None:
                more["segments"] = segments[:, seen]
            if positions is not None:
                more["query_positions"] = positions[:, chunk]
                more["key_positions"] = positions[:, seen]
            outs.append(
                attention(
                    queries,
                    keys[:, :, seen],
                    values[:, :, seen],
                    spec,
                    causal=True,
                    window=window,
                    backend=backend,
                    **more,
                )
            )
        return torch.cat(outs, dim=2)


def check_length(length: int, processes: int) -> None:
    """Check that sequences of a length can be shared.

    Raises:
        ValueError: If the length is no multiple of twice the number of processes.
    """
    if length % (2 * processes):
        raise ValueError(
            f"context_parallel={processes}: sequences of {length} tokens do not divide into "
            f"{2 * processes} chunks, two for each process"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo knows no process groups
def _all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    every: Tensor = _AllGather.apply(part, group)
    return every


class _AllGather(torch.autograd.Function):
    # (...) of each process to (C, ...); torch.distributed.nn has it too, but is deprecated, and
    # its successors have private or new names.

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        every = part.new_empty((group.size(), *part.shape))
        dist.all_gather(list(every.unbind()), part.contiguous(), group=group)
        return every

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        part = gradient.new_empty(gradient.shape[1:])
        dist.reduce_scatter(part, list(gradient.contiguous().unbind()), group=ctx.group)
        return part, None
