"""`PoPE` and `AxialPoPE`: parameters and buffers as in PoPE-pytorch, angles made exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whatwhere.compat.pope_pytorch.polar import (
    Exact,
    PolarEmbedReturn,
    apply_pope_to_qk,
    version,
)
from whatwhere.encodings.base import check_number, check_whole
from whatwhere.encodings.frequencies import geometric

BIAS_BOUND = 2 * math.pi

# Theirs are powers taken in float32; the exponent's rounding is multiplied by ln(theta).
_POWER_ERROR = 4 * torch.finfo(torch.float32).eps


class Polar(nn.Module):
    """What `PoPE` and `AxialPoPE` share: ``bias``, and frequencies that no cast can touch.

    State dicts hold frequencies as tensors, which ``.half()`` casts. Beside them stand the
    numbers they are rounded from. A stored tensor is those numbers as long as it equals them up
    to rounding; once it was changed or loaded to be something else, what it holds counts.

    Args:
        frequencies: Radians per position, of each axis.
        heads: ``H``.
        bias_uniform_init: Whether ``bias`` starts uniformly in ``[-2 pi, 0]`` instead of at 0.
    """

    apply_pope_to_qk = staticmethod(apply_pope_to_qk)

    bias: nn.Parameter

    def __init__(
        self, frequencies: Sequence[Sequence[float]], heads: int, bias_uniform_init: bool
    ) -> None:
        super().__init__()
        heads = check_whole("heads", heads)
        self._first = self._numbers = tuple(tuple(row) for row in frequencies)
        self._seen: list[tuple[Tensor, int]] = []
        self._made: dict[torch.device, Tensor] = {}
        self.bias = nn.Parameter(torch.zeros(heads, sum(len(row) for row in frequencies)))
        if bias_uniform_init:
            nn.init.uniform_(self.bias, -BIAS_BOUND, 0.0)
        # A function, not a method: copies of the module must not look at this one.
        self.register_load_state_dict_post_hook(_look_again)

    def _stored(self) -> list[Tensor]:
        """The tensors of the state dict, one for each axis."""
        raise NotImplementedError

    def _look(self) -> None:
        """Take over stored frequencies that are others than the numbers known."""
        stored = self._stored()
        now = [(x, version(x)) for x in stored]
        if len(now) == len(self._seen) and all(
            a is b and m == n for (a, m), (b, n) in zip(now, self._seen, strict=True)
        ):
            return
        if not any(x.is_meta for x in stored):
            found = tuple(
                _exactly(x, known)
                for x, *known in zip(stored, self._numbers, self._first, strict=True)
            )
            if found != self._numbers:
                self._numbers, self._made = found, {}
        self._seen = now

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._look()
        result = super()._apply(fn, recurse)
        # A cast or a move is no other frequency, whatever it did to the stored ones.
        self._seen = [(x, version(x)) for x in self._stored()]
        return result

    def inv_freq(self, device: torch.device) -> Tensor:
        """``(A, R)`` float64, radians per position; an axis turns channels of its own."""
        compiling = torch.compiler.is_compiling()
        if not compiling and device in self._made:
            return self._made[device]
        before, rows = 0, []
        width = sum(len(numbers) for numbers in self._numbers)
        for numbers in self._numbers:
            after = width - before - len(numbers)
            rows.append([0.0] * before + list(numbers) + [0.0] * after)
            before += len(numbers)
        made = torch.tensor(rows, dtype=torch.float64, device=device)
        if not compiling and type(made) is Tensor and not made.is_inference():
            self._made[device] = made
        return made

    def _bounded(self) -> Tensor:
        """``bias`` in ``[-2 pi, 0]``, its gradient passed: clamped ones could never come back."""
        bias = self.bias
        if (
            self.training
            and torch.is_grad_enabled()
            and bias.requires_grad
            and not torch.compiler.is_exporting()
        ):
            with torch.no_grad():
                bias.data.clamp_(-BIAS_BOUND, 0.0)
        return bias + (bias.clamp(-BIAS_BOUND, 0.0) - bias).detach()

    def _embed(self, positions: Tensor, in_order: bool) -> PolarEmbedReturn:
        """``freqs`` and ``bias`` at positions ``(..., n, A)``, integers or not."""
        if positions.dtype == torch.bool or positions.is_complex():
            raise ValueError(f"positions have dtype {positions.dtype}: expected numbers")
        stored = self._stored()
        if not torch.compiler.is_compiling():
            self._look()
        dtype = torch.promote_types(stored[0].dtype, torch.float32)
        if any(x.requires_grad for x in stored):
            learned = [
                p[..., None] * x.double()
                for p, x in zip(positions.double().unbind(-1), stored, strict=True)
            ]
            return PolarEmbedReturn(torch.cat(learned, dim=-1).to(dtype), self._bounded())
        inv_freq = self.inv_freq(positions.device)
        with torch.no_grad():
            angles = positions.double() @ inv_freq
            freqs = angles.to(dtype)
        made = PolarEmbedReturn(freqs, self._bounded())
        whole = not positions.is_floating_point() and positions.ndim <= 3
        made.exact = Exact(
            angles=angles,
            version=0 if torch.compiler.is_compiling() else version(freqs),
            inv_freq=inv_freq,
            positions=positions if whole else None,
            in_order=in_order,
        )
        return made


def _exactly(stored: Tensor, known: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """What a stored tensor was rounded from if that is known, else what it holds."""
    for numbers in known:
        if _rounds_to(numbers, stored):
            return numbers
    return tuple(stored.detach().double().tolist())


def _rounds_to(numbers: Sequence[float], stored: Tensor) -> bool:
    """Whether a stored tensor is these numbers, rounded to its dtype or before to a lower one."""
    if stored.shape != (len(numbers),):
        return False
    found = stored.detach().cpu()
    exact = torch.tensor(numbers, dtype=torch.float64)
    off = (found.double() - exact).abs()
    for dtype in (stored.dtype, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        allowed = exact.abs() * (info.eps / 2 + _POWER_ERROR) + info.smallest_normal * info.eps
        if torch.equal(found.to(dtype).to(found.dtype), found) and bool((off <= allowed).all()):
            return True
    return False


def _look_again(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, Polar)
    module._look()


def _check_theta(theta: float) -> float:
    theta = check_number("theta", theta)
    if not 0 < theta < float("inf"):
        raise ValueError(f"theta={theta}: expected a positive, finite number")
    return theta


class PoPE(Polar):
    """Angles ``position * theta^(-c / dim)`` and key phases (arXiv 2509.10534).

    Args:
        dim: ``R``, channels that turn; heads may have more, which then pass through.
        heads: ``H``.
        theta: Base of the frequencies.
        bias_uniform_init: Start ``bias`` uniformly in ``[-2 pi, 0]`` instead of at 0.
        inv_freqs: ``(R,)`` frequencies of your own, radians per position.

    Raises:
        ValueError: If an argument is out of range.
    """

    inv_freqs: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        theta: float = 10000,
        bias_uniform_init: bool = False,
        inv_freqs: Tensor | Sequence[float] | None = None,
    ) -> None:
        dim = check_whole("dim", dim)
        numbers = geometric(dim, _check_theta(theta))
        if inv_freqs is not None and not isinstance(inv_freqs, Tensor):
            numbers = tuple(check_number("inv_freqs", x) for x in inv_freqs)
        super().__init__((numbers,), heads, bias_uniform_init)
        stored = inv_freqs if isinstance(inv_freqs, Tensor) else torch.tensor(numbers)
        stored = stored if stored.is_floating_point() else stored.float()
        if stored.shape != (dim,):
            raise ValueError(
                f"inv_freqs has shape {tuple(stored.shape)}: expected ({dim},), one per channel"
            )
        self.register_buffer("inv_freqs", stored)
        self._look()

    def _stored(self) -> list[Tensor]:
        return [self.inv_freqs]

    @property
    def device(self) -> torch.device:
        """Where the frequencies lie."""
        return self.inv_freqs.device

    def forward(
        self, pos_or_seq_len: Tensor | int, offset: Tensor | float = 0
    ) -> PolarEmbedReturn:
        """Angles at ``offset .. offset + n - 1``, or at positions given.

        Args:
            pos_or_seq_len: ``n``, or positions ``(n,)`` or ``(B, n)``, integers or not.
            offset: Added to all positions.

        Returns:
            ``freqs`` ``(..., n, R)``, float32 or the dtype of the frequencies if that is wider,
            and ``bias`` ``(H, R)`` within ``[-2 pi, 0]``.

        Raises:
            ValueError: If positions are no numbers or have no axis.
        """
        if isinstance(pos_or_seq_len, Tensor):
            at = pos_or_seq_len
        elif isinstance(pos_or_seq_len, (int, torch.SymInt)) and pos_or_seq_len >= 0:
            at = torch.arange(pos_or_seq_len, device=self.device)
        else:
            raise ValueError(
                f"pos_or_seq_len={pos_or_seq_len!r}: expected a length or a tensor of positions"
            )
        if at.ndim == 0:
            raise ValueError("pos_or_seq_len is a tensor without axes: expected (n,) or (B, n)")
        single = not isinstance(offset, Tensor) or offset.ndim == 0
        if not (isinstance(offset, int) and offset == 0):
            # Exact where the sum has both parts' digits: long for integers, else float64.
            wide = isinstance(offset, float) or at.is_floating_point()
            wide = wide or (isinstance(offset, Tensor) and offset.is_floating_point())
            at = at.to(torch.float64 if wide else torch.int64) + offset
        elif not at.is_floating_point() and at.dtype != torch.bool:
            at = at.long()
        in_order = single and not isinstance(pos_or_seq_len, Tensor)
        return self._embed(at[..., None], in_order)


class AxialPoPE(Polar):
    """`PoPE` for positions of several axes, each of which turns channels of its own.

    Args:
        dim: ``R``, channels that turn.
        heads: ``H``.
        axial_dims: Channels of each axis, together ``dim``; ``None`` is one axis.
        theta: Base of the frequencies of every axis, ``theta^(-c / axial_dim)``.
        bias_uniform_init: Start ``bias`` uniformly in ``[-2 pi, 0]`` instead of at 0.

    Raises:
        ValueError: If an argument is out of range or the axes do not add up.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        axial_dims: tuple[int, ...] | None = None,
        theta: float = 10000,
        bias_uniform_init: bool = False,
    ) -> None:
        dim = check_whole("dim", dim)
        given = (dim,) if axial_dims is None else tuple(axial_dims)
        axes = tuple(check_whole("axial_dims", n) for n in given)
        if sum(axes) != dim:
            raise ValueError(f"axial_dims={axes} add up to {sum(axes)}: expected dim={dim}")
        theta = _check_theta(theta)
        super().__init__([geometric(n, theta) for n in axes], heads, bias_uniform_init)
        self.dim, self.heads, self.axial_dims = dim, heads, given
        # Frozen parameters, as theirs are: the names in a state dict are those of a list.
        self.inv_freqs = nn.ParameterList(
            nn.Parameter(torch.tensor(row), requires_grad=False) for row in self._numbers
        )
        self._look()

    def _stored(self) -> list[Tensor]:
        return list(self.inv_freqs)

    @property
    def device(self) -> torch.device:
        """Where ``bias`` lies."""
        return self.bias.device

    @staticmethod
    def get_grid_positions(*dims: int, device: torch.device | str | None = None) -> Tensor:
        """Positions of a grid in row-major order, axes *last first*: ``(prod(dims), A)`` float32.

        The first column, hence the first of ``axial_dims``, counts along the last of ``dims``, as
        in PoPE-pytorch: ``get_grid_positions(frames, height, width)`` is ``(x, y, t)``.
        """
        return _grid(dims, device).float()

    def forward(self, pos_or_dims: Tensor | tuple[int, ...]) -> PolarEmbedReturn:
        """Angles of a grid, or at positions given.

        Args:
            pos_or_dims: Sizes of a grid (see `get_grid_positions` for the order of axes), or
                positions ``(n, A)`` or ``(B, n, A)``, integers or not.

        Returns:
            As `PoPE`.

        Raises:
            ValueError: If there is not a position for each axis.
        """
        if isinstance(pos_or_dims, Tensor):
            at = pos_or_dims
        elif isinstance(pos_or_dims, (tuple, list)):
            at = _grid(pos_or_dims, self.device)
        else:
            raise ValueError(
                f"pos_or_dims={pos_or_dims!r}: expected sizes of a grid or a tensor of positions"
            )
        if at.ndim < 2 or at.shape[-1] != len(self.axial_dims):
            raise ValueError(
                f"positions have shape {tuple(at.shape)}: expected (..., n, "
                f"{len(self.axial_dims)}), a column for each of axial_dims={self.axial_dims}"
            )
        if not at.is_floating_point() and at.dtype != torch.bool:
            at = at.long()
        one = isinstance(pos_or_dims, (tuple, list)) and len(self.axial_dims) == 1
        return self._embed(at, in_order=one)


def _grid(dims: Sequence[int], device: torch.device | str | None) -> Tensor:
    sizes = [check_whole("dims", n) for n in dims]
    if not sizes:
        raise ValueError("dims is empty: expected a size for each axis of the grid")
    grid = torch.meshgrid(*[torch.arange(n, device=device) for n in sizes], indexing="ij")
    return torch.stack([g.flatten() for g in reversed(grid)], dim=-1)
