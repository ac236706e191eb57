"""Tables of cos and sin: kept from call to call for positions in order, made anew for others."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from whatwhere.attention.angles import rotation_table

# Bytes kept in all; a single table beyond that is made for each call.
LIMIT = 2**28

_kept: OrderedDict[tuple[bytes, torch.dtype], Tensor] = OrderedDict()
_lock = threading.Lock()


def in_order(inv_freq: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """cos and sin beside one another at positions 0..length-1: ``(length, 2 R)``.

    Every row is the float64 angle's cos and sin rounded once, whenever it was added: a table
    grows by rows, to twice its length, and rows once made stay as they are. At most `LIMIT` bytes
    are kept, the tables used last.

    Args:
        inv_freq: ``(1, R)`` float64.
        length: Positions.
        dtype: Of the table.
    """
    size = 2 * inv_freq.shape[1] * dtype.itemsize
    if length * size > LIMIT:
        return _rows(inv_freq, 0, length, dtype)
    key = (inv_freq.detach().numpy().tobytes(), dtype)
    with _lock:
        table = _kept.get(key)
        have = 0 if table is None else table.shape[0]
        if have < length:
            wanted = min(max(length, 2 * have, 256), LIMIT // max(size, 1))
            more = _rows(inv_freq, have, wanted, dtype)
            table = more if table is None else torch.cat((table, more))
            _kept[key] = table
        _kept.move_to_end(key)
        while sum(kept.nbytes for kept in _kept.values()) > LIMIT:
            _kept.popitem(last=False)
    assert table is not None
    return table[:length]


def kept_bytes() -> int:
    """Bytes of the tables that are kept."""
    with _lock:
        return sum(table.nbytes for table in _kept.values())


def _rows(inv_freq: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        at = torch.arange(start, stop)[:, None]
        return torch.cat(rotation_table(inv_freq, at, dtype), dim=-1)


class Angles:
    """cos and sin at the positions of one side of a call.

    Args:
        inv_freq: ``(A, R)`` float64.
        positions: ``(B or 1, L, A)`` integers, or ``None`` for ``start`` onwards.
        start: First position where none are given.
        length: ``L``.
        dtype: Of cos and sin.
    """

    def __init__(
        self,
        inv_freq: Tensor,
        positions: Tensor | None,
        start: int,
        length: int,
        dtype: torch.dtype,
    ) -> None:
        self.inv_freq, self.dtype = inv_freq, dtype
        self.width = inv_freq.shape[1]
        self.positions = positions
        self.table: Tensor | None = None
        if positions is None:
            self.table = in_order(inv_freq, start + length, dtype)[start:]
        elif inv_freq.shape[0] == 1 and positions.numel():
            least, most = (int(x) for x in positions.aminmax())
            # Looking rows up beats computing them, unless most of the table would be for nothing.
            if least >= 0 and most < max(4096, 4 * length):
                self.table = in_order(inv_freq, most + 1, dtype)
                ascending = torch.arange(least, least + length)
                if most - least + 1 == length and bool((positions[..., 0] == ascending).all()):
                    self.table, self.positions = self.table[least:], None

    @property
    def shared(self) -> bool:
        """Whether all sequences of the batch stand at the same positions."""
        return self.positions is None or self.positions.shape[0] == 1

    def at(self, batch: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """``(b or 1, 1, l, R)`` each, for some sequences and some of their rows."""
        if self.positions is None:
            assert self.table is not None
            found = self.table[None, rows]
        else:
            places = self.positions[slice(None) if self.shared else batch, rows]
            if self.table is None:
                return tuple(x[:, None] for x in rotation_table(self.inv_freq, places, self.dtype))  # type: ignore[return-value]
            found = self.table[places[..., 0]]
        return found[:, None, :, : self.width], found[:, None, :, self.width :]
