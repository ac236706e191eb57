"""How a converted model attends: its own modules, with `whatwhere.attention` between them.

The decoder works out where every token stands, once a forward pass, and hands that to its layers
among their keyword arguments. A hook before each attention module gives it cos and sin to turn by
(of our encoding for rotations, so that keys are turned as in the model it was; else 1 and 0, which
turn nothing), and puts a view before the cache that stores keys in the form that decodes fastest.
The function registered with transformers' `AttentionInterface` then attends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from whatwhere.attention import attention, encode_keys, encode_queries, unturned
from whatwhere.attention.angles import rotation_table
from whatwhere.encodings import Encoding
from whatwhere.models.cache import Form, choose_form
from whatwhere.models.conversion.structure import CACHE_NAMES, Parts
from whatwhere.models.layout import Layout
from whatwhere.spec import ScoreSpec

IMPLEMENTATION = "whatwhere"
"""Name of the attention function among transformers' own."""

ENCODING = "position_encoding"
"""Name of the encoding within an attention module, and so in checkpoints."""

STEPS = "position_steps"
"""Keyword argument that carries the `Step` of every layer from the decoder."""

CALL = "attention_call"
"""Keyword argument that carries what the hook found out to `attend`."""


@dataclass(frozen=True, eq=False)
class Step:
    """What one layer needs to know of one forward pass.

    Attributes:
        layout: Where its tokens stand, and which keys they may see.
        cos: ``(1 or B, T or 1, W)`` for the model's own rotation; 1 where nothing is to turn.
        sin: Likewise; 0 where nothing is to turn.
        turned: Whether that rotation is the encoding's.
    """

    layout: Layout
    cos: Tensor
    sin: Tensor
    turned: bool

    def to(self, device: torch.device, *args: Any, **kwargs: Any) -> Step:
        """On another device, for models whose layers lie on several."""
        cos, sin = self.cos.to(device), self.sin.to(device)
        return replace(self, layout=self.layout.to(device), cos=cos, sin=sin)


@dataclass(frozen=True)
class Rotations:
    """The rotations of a decoder's layers, worked out when encodings are attached.

    Attributes:
        frequencies: Distinct rows of radians per position; an empty one turns nothing.
        of_layer: Which of them each layer has.
        halves: For each of them, half the width of the model's rotation: pair ``c`` is channels
            ``c`` and ``c + half``.
        first_of_kind: For each layer, the first that sees as many keys as it does.
    """

    frequencies: tuple[tuple[float, ...], ...]
    of_layer: tuple[int, ...]
    halves: tuple[int, ...]
    first_of_kind: tuple[int, ...]

    @classmethod
    def of(cls, parts: Parts, encodings: list[Encoding]) -> Rotations:
        """Those of the encodings of a decoder's layers."""
        rows = [_turned_by_model(encoding) for encoding in encodings]
        distinct = tuple(dict.fromkeys(rows))
        own = [_own_half(parts, layer) for layer in range(len(rows))]
        halves = []
        for row in distinct:
            half = own[rows.index(row)]
            # A partial rotation can be as wide as the encoding needs, but keeps the model's own
            # pairs if those are enough; where nothing turns it can be empty.
            wanted = 0 if not row else max(half, len(row))
            halves.append(wanted if parts.partial else half)
        kinds = [parts.layer_type(layer) for layer in range(len(rows))]
        return cls(
            frequencies=distinct,
            of_layer=tuple(distinct.index(row) for row in rows),
            halves=tuple(halves),
            first_of_kind=tuple(kinds.index(kind) for kind in kinds),
        )

    def tables(self, index: int, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for the model's rotation, exact at any position, at least float32."""
        row, half = self.frequencies[index], self.halves[index]
        if not row:
            shape = (1, 1, 2 * half)
            return like.new_ones(shape), like.new_zeros(shape)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        still = (0.0,) * (half - len(row))
        inv_freq = _row((*row, *still, *row, *still), positions.device)
        at = positions.reshape(-1, positions.shape[-1], 1)
        return rotation_table(inv_freq, at, dtype)


def _row(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """``(1, R)`` float64, made once for each device."""
    if torch.compiler.is_compiling():
        return torch.tensor([frequencies], dtype=torch.float64, device=device)
    return _kept_row(frequencies, device)


@lru_cache(maxsize=64)
def _kept_row(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may be one with gradients
        return torch.tensor([frequencies], dtype=torch.float64, device=device)


class Unused(nn.Module):
    """Stands where the model's rotary embedding was."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[None, None]:
        """Nothing: the hook before each attention module gives it cos and sin."""
        return None, None


class CacheView:
    """A cache as one attention module sees it: keys change their form on the way in.

    Args:
        cache: transformers' container.
        spec: The layer's score.
        layout: Of this forward pass.
        form: What the cache keeps.
    """

    def __init__(self, cache: Cache, spec: ScoreSpec, layout: Layout, form: Form) -> None:
        self.cache, self.spec, self.layout, self.form = cache, spec, layout, form

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and give those that the new queries may see."""
        keys = keys.to(values.dtype)
        if self.spec.feature == "identity":
            pass  # turned by the model, or not at all
        elif self.form == "encoded":
            keys = encode_keys(keys, self.spec, self.layout.positions)
        else:
            keys = unturned(keys, self.spec)
        stored: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer, *args, **kwargs)
        if self.layout.fresh:
            return keys, values
        if self.layout.key_positions is not None:
            # While an assistant's guesses may be taken back, transformers up to 5.17 gives more
            # keys of a sliding window than it says.
            said = self.layout.key_positions.shape[-1]
            return stored[0][:, :, -said:], stored[1][:, :, -said:]
        return stored


@dataclass(frozen=True, eq=False)
class _Call:
    """What the hook before an attention module has found out for the function after it.

    Attributes:
        spec: The score that is left to compute: of raw channels, of turned ones or of magnitudes.
        layout: Of this forward pass.
        form: What the keys have been made into on their way into a cache, ``None`` without one.
    """

    spec: ScoreSpec
    layout: Layout
    form: Form | None


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook before an attention module: see the top of this file."""
    given = dict(kwargs)
    steps = given.pop(STEPS, None)
    known = cast(Any, module)
    if steps is None:
        raise RuntimeError(
            f"the attention of layer {known.layer_idx} was called without {STEPS}: call the "
            "converted model or its decoder, not a layer alone"
        )
    hidden = given["hidden_states"] if "hidden_states" in given else args[0]
    step: Step = steps[known.layer_idx]
    if step.cos.device != hidden.device:
        step = step.to(hidden.device)
    spec: ScoreSpec = getattr(module, ENCODING)(hidden.device)
    softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is not None:
        spec = replace(spec, softcap=softcap)
    if step.turned:
        spec = replace(spec, feature="identity", inv_freq=None, turning=None)
    given["position_embeddings"] = (step.cos, step.sin)
    form: Form | None = None
    for name in CACHE_NAMES:
        if given.get(name) is not None:
            form = choose_form(known.config.cache_form, spec, hidden.device)[0]
            given[name] = CacheView(given[name], spec, step.layout, form)
    given[CALL] = _Call(spec, step.layout, form)
    return args, given


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls: ``(B, H, T, D)`` to ``(B, T, H, D)``, and no weights.

    The mask and the scale are not those of transformers but of the layout and the encoding.
    """
    call: _Call = kwargs[CALL]
    spec, layout = call.spec, call.layout
    query, key = query.to(value.dtype), key.to(value.dtype)
    query_positions, key_positions = layout.at(spec)
    plain = spec.feature == "identity" and spec.temperature_length is None
    if call.form == "encoded" and not plain:
        query = encode_queries(query, spec, layout.positions)
        spec = spec.encoded()
    elif call.form == "raw":
        query, spec = unturned(query, spec), spec.unturned()
    out = attention(
        query,
        key,
        value,
        spec,
        causal=True,
        query_positions=query_positions,
        key_positions=key_positions,
        key_mask=layout.key_mask,
        segments=layout.segments,
        window=sliding_window,
        backend=cast(Any, module).config.attention_backend,
    )
    return out.transpose(1, 2), None


def _turned_by_model(encoding: Encoding) -> tuple[float, ...]:
    """Frequencies that the model's own rotation can turn by; none for polar and plain scores."""
    with torch.no_grad():
        spec = encoding()
    return encoding.frequencies[0] if spec.feature == "rotate" else ()


def _own_half(parts: Parts, layer: int) -> int:
    if not parts.partial:
        return parts.head_dim // 2
    share = parts.rope_parameters(layer).get("partial_rotary_factor", 1.0)
    return int(parts.head_dim * share) // 2


AttentionInterface.register(IMPLEMENTATION, attend)
