"""What every attention layer computes its scores from, handed out while the model runs.

Nothing of a model changes: for the time of the measurement the names that its attention modules
look up in their file (the table of attention functions, the rotation) lead to functions that look
on and call what was there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from whatwhere.analysis.layers import (
    INTERFACE,
    AttentionLayer,
    NotFiniteError,
    code_of,
    find_layers,
    first_broken,
)
from whatwhere.analysis.rotation import Turn, read_rotation, record
from whatwhere.attention import encode_keys, encode_queries, unturned
from whatwhere.models.conversion.forward import CALL
from whatwhere.models.layout import Layout
from whatwhere.spec import ScoreSpec

ROTATIONS = "apply_rotary"
"""How the names of transformers' rotations begin."""

# Names of a file that two threads swap would not be put back in the order that they were taken.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True, eq=False)
class Seen:
    """What one layer computes its scores from in one forward pass.

    Score of a query and a key: their inner product ``after`` the encoding times ``scale``, then
    ``softcap * tanh(score / softcap)``, then ``bias`` and ``-slopes * (t - s)``.

    Attributes:
        layer: The layer.
        queries: ``(B, H, T, F)`` after the encoding; F is ``D``, or more for polar features.
        keys: ``(B, G, T, F)``.
        queries_before: ``(B, H, T, D)`` before it: raw channels, or the magnitudes of polar ones.
        keys_before: ``(B, G, T, D)``.
        scale: Factor of the inner products.
        softcap: Bound of scores, or ``None``.
        slopes: ``(H,)`` or ``None``.
        sinks: ``(H,)`` learned logits that take part in the softmax without a value, or ``None``.
        mask: ``(B or 1, H or 1, T, T)``, true (or 0 where it is added) for keys that are seen; a
            function of row and column indices; or ``None``.
        bias: Added to scores, ``(B or 1, H or 1, T, T)``, or ``None``.
        causal: Whether later keys are hidden, where there is no mask.
        window: Keys that a query sees at most, where there is no mask, or ``None``.
        phase: ``(H, R)`` of polar scores, or ``None``.
    """

    layer: AttentionLayer
    queries: Tensor
    keys: Tensor
    queries_before: Tensor
    keys_before: Tensor
    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    mask: Any = None
    bias: Tensor | None = None
    causal: bool = True
    window: int | None = None
    phase: Tensor | None = None


class _Observer:
    """What stands between a model's attention modules and `observe` for one measurement."""

    def __init__(
        self, model: nn.Module, layers: list[AttentionLayer], observe: Callable[[Seen], None]
    ) -> None:
        self.model, self.observe = model, observe
        self.layers = {id(layer.module): layer for layer in layers}
        self.current: AttentionLayer | None = None
        self.thread = 0
        self.turns: list[Turn] = []
        # What keys were before their rotation, for layers that attend to those of another one;
        # known as long as the model itself keeps the keys.
        self.keys_before: Any = WeakIdKeyDictionary()

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.current, self.turns = self.layers[id(module)], []
        self.thread = threading.get_ident()
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._check(hidden, "is given")

    def leave(self, *_: Any) -> None:
        self.current, self.turns = None, []

    def turning(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def looked_on(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            # Another model of the family may run in another thread meanwhile.
            if self.current is not None and self.thread == threading.get_ident():
                self.turns.append(record(function, args, kwargs, out))
            return out

        return looked_on

    def attending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def looked_on(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            layer = self.layers.get(id(module))
            if layer is not None:
                seen = self._described(layer, *args, **kwargs)
                self.turns = []
                self._hand_over(seen)
                del seen
            return function(module, *args, **kwargs)

        return looked_on

    def own(self, module: nn.Module, q: Tensor, k: Tensor, spec: ScoreSpec, at: Layout) -> None:
        layer = self.layers[id(module)]
        layer.window = cast(Any, module).config.sliding_window
        self._hand_over(_encoded(layer, q, k, q, k, spec, spec, at))

    def _described(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any = None,
        **kwargs: Any,
    ) -> Seen:
        before = self._inputs(query, key)
        layer.window = kwargs.get("sliding_window")
        call = kwargs.get(CALL)
        if call is not None:  # a converted model
            assert layer.encoding is not None
            spec = layer.encoding(query.device)
            if not layer.heads and spec.feature == "rotate":
                _read(layer, self.turns[0], query)
            return _encoded(layer, query, key, *before, call.spec, spec, call.layout)
        if not layer.heads and self.turns:
            _read(layer, self.turns[0], query)
            if before[1] is key:  # what turned it was not seen
                layer.feature = "unknown"
        _measure(layer, query, key)
        scale = kwargs.get("scaling")
        causal = kwargs.get("is_causal")
        if causal is None:
            causal = getattr(layer.module, "is_causal", True)
        return Seen(
            layer,
            query,
            key,
            *before,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            mask=_mask(mask),
            bias=kwargs.get("position_bias"),
            causal=causal,
            window=layer.window,
        )

    def _inputs(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys before their rotation, as wide as after it."""
        each = [zip(turn.inputs, turn.outputs, strict=True) for turn in self.turns]
        given = [pair for turn in each for pair in turn]
        if not given:
            return query, key
        q_before = _widened(*given[0], query)
        if len(given) < 2:
            return q_before, self.keys_before.get(key, key)
        k_before = self.keys_before[key] = _widened(*given[1], key)
        return q_before, k_before

    def _hand_over(self, seen: Seen) -> None:
        for name in ("queries", "keys"):
            self._check(getattr(seen, name), f"computes {name} of", seen.layer)
        self.observe(seen)

    def _check(self, x: Tensor, what: str, layer: AttentionLayer | None = None) -> None:
        if bool(x.isfinite().all()):
            return
        named = layer or self.current
        assert named is not None
        broken = first_broken(self.model)
        cause = f"its weights {broken} hold some" if broken else "its weights are finite"
        raise NotFiniteError(
            f"model: attention layer {named.index} {what} NaN or infinity ({cause})"
        )


@contextmanager
def observed(model: nn.Module, observe: Callable[[Seen], None]) -> Iterator[list[AttentionLayer]]:
    """Call ``observe`` with what each attention layer computes its scores from.

    While the context lasts, forward passes of ``model`` give `Seen` to ``observe`` layer by layer,
    and the very outputs that they give without it. Afterwards, whatever happened, the model and
    transformers are as they were. Of several threads one observes at a time, the others wait.

    Args:
        model: Of `whatwhere.models`, converted, or any of transformers whose attention modules
            attend through its table of attention functions. Not compiled.
        observe: Gets tensors of the running pass, which it must not change.

    Yields:
        The layers, in order.

    Raises:
        NoAttentionError: If there is nothing to observe.
        NotFiniteError: From a forward pass, if a layer's input, queries or keys hold NaN.
    """
    layers = find_layers(model)
    observer = _Observer(model, layers, observe)
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        for layer in layers:
            if layer.own:
                stack.enter_context(_attribute(layer.module, "observer", observer.own))
            module = layer.module
            hook = module.register_forward_pre_hook(observer.enter, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(module.register_forward_hook(observer.leave, always_call=True).remove)
        files = {id(code_of(x.module).__globals__): x.module for x in layers if not x.own}
        for module in files.values():
            names: dict[str, Any] = code_of(module).__globals__
            stack.enter_context(_swapped(names, INTERFACE, _Functions(names[INTERFACE], observer)))
            for name in [n for n in names if n.startswith(ROTATIONS) and callable(names[n])]:
                stack.enter_context(_swapped(names, name, observer.turning(names[name])))
        yield layers


class _Functions:
    """transformers' table of attention functions, with an observer before each of them."""

    def __init__(self, table: Any, observer: _Observer) -> None:
        self._table, self._observer = table, observer

    def get_interface(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._observer.attending(self._table.get_interface(*args, **kwargs))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._observer.attending(self._table[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)


@contextmanager
def _swapped(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = before


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _encoded(
    layer: AttentionLayer,
    q: Tensor,
    k: Tensor,
    q_before: Tensor,
    k_before: Tensor,
    spec: ScoreSpec,
    own: ScoreSpec,
    at: Layout,
) -> Seen:
    """What a layer with an encoding of ours attends to.

    Args:
        layer: The layer.
        q: Queries as attention gets them.
        k: Keys likewise.
        q_before: Queries before any rotation.
        k_before: Keys likewise.
        spec: What is left to compute from ``q`` and ``k``.
        own: The encoding's score.
        at: Where tokens stand.
    """
    if at.key_mask is not None or at.segments is not None or not at.fresh:
        raise ValueError("padded, packed and cached batches cannot be observed: expected texts")
    if not layer.heads:
        layer.feature = own.feature
        if own.inv_freq is not None:
            pairs, turning = own.num_frequencies, own.num_turning
            layer.frequencies = tuple(own.inv_freq[0, :turning].tolist())
            if own.feature == "rotate" and not layer.pairs:  # a converted model keeps its own
                layer.pairs = tuple((c, c + pairs) for c in range(turning))
    _measure(layer, q, k)
    return Seen(
        layer,
        encode_queries(q, spec, at.positions),
        encode_keys(k, spec, at.positions),
        unturned(q_before, own),
        unturned(k_before, own),
        scale=own.scale,
        softcap=spec.softcap,
        slopes=spec.slopes,
        window=layer.window,
        phase=own.phase,
    )


def _measure(layer: AttentionLayer, query: Tensor, key: Tensor) -> None:
    layer.heads, layer.key_heads = query.shape[1], key.shape[1]
    layer.head_dim = query.shape[-1]


def _offset(out: Tensor, whole: Tensor) -> int | None:
    """Where in a head the rotated channels stand, ``None`` if nowhere as they left it."""
    width, total = out.shape[-1], whole.shape[-1]
    if out.shape[1] not in (1, whole.shape[1]):  # repeated since
        return None
    for start in (0, total - width):
        part = whole[..., start : start + width]
        fits = out.shape[-2] == part.shape[-2]
        if fits and torch.equal(out.to(part.dtype).expand_as(part), part):
            return start
    return None


def _widened(before: Tensor, after: Tensor, whole: Tensor) -> Tensor:
    if after.shape[1] == whole.shape[2] != whole.shape[1]:
        before, after = before.transpose(1, 2), after.transpose(1, 2)
    start = _offset(after, whole)
    if start is None:
        return whole
    width = before.shape[-1]
    if width == whole.shape[-1]:
        return before
    inside = before.expand(*whole.shape[:-1], width)
    return torch.cat((whole[..., :start], inside, whole[..., start + width :]), dim=-1)


def _read(layer: AttentionLayer, turn: Turn, query: Tensor) -> None:
    """Fill in what a stock layer's rotation says."""
    rotation = read_rotation(turn, query.shape[2])
    out = turn.outputs[0]
    if out.shape[1] == query.shape[2] != query.shape[1]:
        out = out.transpose(1, 2)
    start = _offset(out, query)
    if rotation is None or start is None:
        layer.feature = "unknown"
        return
    layer.feature, layer.frequencies = "rotate", rotation.frequencies
    layer.pairs = tuple((a + start, b + start) for a, b in rotation.pairs)


def _mask(given: Any) -> Any:
    """A mask as `Seen` describes it; masks of two axes say padding alone, which texts have not."""
    if isinstance(given, Tensor):
        return given if given.ndim == 4 else None
    rule = getattr(given, "mask_mod", None)
    if rule is None:
        return None

    def by_index(rows: Tensor, columns: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=rows.device)
        return cast(Tensor, rule(zero, zero, rows[:, None], columns[None]))

    return by_index


__all__ = ["Seen", "observed"]
