"""Weights of a RoPE model made into those a PoPE model starts from, whatever the family.

`whatwhere.models.initialise` says how the channels of each head are recombined. Here queries and
keys are recorded while the unconverted model reads some text, and the recombination goes into its
projections, wherever a family has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from whatwhere.attention import attention
from whatwhere.encodings import Encoding, NoPE
from whatwhere.encodings.frequencies import geometric
from whatwhere.models.conversion.forward import ENCODING
from whatwhere.models.conversion.structure import NotConvertibleError, Parts
from whatwhere.models.initialise import (
    PolarStart,
    from_centres,
    from_order,
    from_scores,
    from_signs,
    recombined,
)
from whatwhere.models.score_distil import distilled

Start = Literal["weights", "order", "signs", "centres", "scores", "distilled", "distilled-zero"]
_FITTED = ("scores", "distilled", "distilled-zero")
_WITH_TEXT = ("signs", "centres", *_FITTED)
_THROUGH_NORMS = ("order", "signs", "distilled")
# Of delta alone, which is all that can be distilled beside a norm (docs/from_rope.md).
_DELTA_RATE = 3e-2
# Scores are fitted to no more windows than these, which is what docs/from_rope.md has measured.
_FIT_WINDOWS = 8
_RECORDING, _RECORDED = "whatwhere_recording", "_recorded_states"


def check_start(
    parts: Parts, name: str, encoding: str, given: dict[str, Any], text: Tensor | None
) -> dict[str, Any]:
    """Options of the encoding for a start, those that follow from the model filled in.

    Raises:
        ValueError: If there is no such start, or it does not suit the encoding or the model.
    """
    if name not in get_args(Start):
        raise ValueError(f"start={name!r}: expected one of {', '.join(get_args(Start))}")
    if name == "weights":
        return given
    if encoding != "pope" or {"magnitude", "delta", "base", "scale"} & set(given):
        raise ValueError(
            f"start={name!r} is for encoding 'pope' as the model's frequencies have it: expected "
            f"no other ({encoding!r}), and no option base, scale, delta or magnitude"
        )
    if name in _WITH_TEXT and text is None:
        raise ValueError(f"start={name!r} needs calibration, (N, T) tokens of some text")
    normed = hasattr(parts.attentions[0], "q_norm")
    if normed and name not in _THROUGH_NORMS:
        raise ValueError(
            f"start={name!r} recombines channels, which does not pass the model's QK-Norm: "
            f"expected one of {', '.join(_THROUGH_NORMS)}"
        )
    for layer in range(len(parts.attentions)):
        kind = parts.rope_parameters(layer).get("rope_type", "default")
        if name in _FITTED and kind != "default":
            raise ValueError(
                f"start={name!r} fits plain frequencies, those of this model are scaled "
                f"(rope_type={kind!r}): expected another start"
            )
        _projections(parts, parts.attentions[layer])
    share = parts.rope_parameters(0).get("partial_rotary_factor", 1.0) if parts.partial else 1.0
    if share < 1 and {"fraction", "rest"} & set(given):
        raise ValueError(
            f"start={name!r} turns the channels that the model turns ({share:.0%}) and passes "
            "the rest: leave out fraction and rest"
        )
    return given | ({"fraction": share, "rest": "raw"} if share < 1 else {})


def make_starts(
    model: Any, parts: Parts, name: str, text: Tensor | None
) -> list[PolarStart | None]:
    """The start of each layer that rotates, worked out on the unconverted model."""
    states = _record(model, parts, text) if name in _WITH_TEXT and text is not None else {}
    made: list[PolarStart | None] = []
    for layer, module in enumerate(parts.attentions):
        if not parts.rotates(layer):
            made.append(None)
            continue
        own = parts.rope_parameters(layer)
        share = own.get("partial_rotary_factor", 1.0) if parts.partial else 1.0
        turning = 2 * round(parts.head_dim * share / 2)
        scale = float(cast(Any, module).scaling)
        ordered = from_order(parts.heads, parts.key_heads, parts.head_dim, turning, scale)
        if name == "order":
            made.append(ordered)
        elif name in _FITTED:
            base = float(own.get("rope_theta", 10000.0))
            pairs, channels = (
                torch.tensor(geometric(count, base), dtype=torch.float64, device=model.device)
                for count in (turning // 2, turning)
            )
            q, k = states[module]
            given = (q, k, pairs, channels, scale)
            if name == "distilled-zero":  # delta stays 0
                made.append(distilled(ordered, *given, train="maps"))
            elif hasattr(module, "q_norm"):
                signed = from_signs(q, k, turning, scale)
                made.append(distilled(signed, *given, train="delta", learning_rate=_DELTA_RATE))
            else:
                few = (q[:_FIT_WINDOWS], k[:_FIT_WINDOWS])
                fitted = from_scores(*few, pairs, channels, scale)
                made.append(distilled(fitted, *given) if name == "distilled" else fitted)
        else:
            function = {"signs": from_signs, "centres": from_centres}[name]
            made.append(function(*states[module], turning, scale))
    return made


@torch.no_grad()
def apply_starts(parts: Parts, starts: list[PolarStart | None]) -> None:
    """Put the starts into the projections and encodings of a converted decoder."""
    for module, start in zip(parts.attentions, starts, strict=True):
        if start is None:
            continue
        normed = hasattr(module, "q_norm")
        for (weights, rows), maps, norm in zip(
            _projections(parts, module),
            (start.queries, start.keys),
            ("q_norm", "k_norm"),
            strict=True,
        ):
            # A norm takes the gain away, and gets it back in its own weights.
            gain = maps.abs().amax() if normed else 1.0
            for weight in weights:
                weight[rows] = recombined(maps / gain, weight[rows])
            if normed:
                _permute_norm(getattr(module, norm), maps.abs())
        encoding: Encoding = getattr(module, ENCODING)
        delta = cast(Tensor, encoding.delta)
        delta.copy_(start.delta)


def _permute_norm(norm: nn.Module, maps: Tensor) -> None:
    weight = cast(Tensor, norm.weight)
    # Gemma's norms multiply by 1 + weight.
    offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
    heads = weight.numel() // maps.shape[-1]
    rows = recombined(maps[:heads], weight + offset)
    weight.copy_(rows - offset)


def _projections(parts: Parts, module: Any) -> list[tuple[list[Tensor], Tensor]]:
    """Weights and biases that make queries and keys, and which of their rows do.

    Raises:
        NotConvertibleError: If they are not found, or are not floating point.
    """
    heads, shared, width = parts.heads, parts.key_heads, parts.head_dim
    queries, keys = torch.arange(heads * width), torch.arange(shared * width)
    if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
        found = [(module.q_proj, queries), (module.k_proj, keys)]
    elif hasattr(module, "qkv_proj"):
        found = [(module.qkv_proj, queries), (module.qkv_proj, heads * width + keys)]
    elif hasattr(module, "query_key_value"):  # queries, keys and values beside one another
        by_head = torch.arange(3 * heads * width).view(heads, 3, width)
        found = [(module.query_key_value, by_head[:, part].flatten()) for part in (0, 1)]
    else:
        raise NotConvertibleError(
            f"{type(module).__name__} has no q_proj and k_proj, qkv_proj or query_key_value"
        )
    made = []
    for projection, rows in found:
        weights = [x for x in (projection.weight, projection.bias) if x is not None]
        if not all(weight.is_floating_point() for weight in weights):
            raise NotConvertibleError(
                f"the projections of {type(module).__name__} are {weights[0].dtype}: expected "
                "floating point weights to recombine"
            )
        made.append(([weight.data for weight in weights], rows))
    return made


@torch.no_grad()
def _record(model: Any, parts: Parts, text: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Queries ``(N, H, T, D)`` and keys ``(N, G, T, D)`` of each layer, before rotation."""
    if text.ndim != 2 or text.is_floating_point() or text.shape[1] < 2:
        raise ValueError(
            f"calibration has shape {tuple(text.shape)} and dtype {text.dtype}: expected integers "
            "of shape (N, T), T at least 2"
        )
    least, most = int(text.min()), int(text.max())
    if least < 0 or most >= model.config.vocab_size:
        raise ValueError(
            f"calibration has tokens {least} to {most}: expected those of the model's vocabulary "
            f"of {model.config.vocab_size}"
        )
    with _recording(model, parts):
        model.eval()(input_ids=text.to(model.device), use_cache=False)
        return {module: getattr(module, _RECORDED) for module in parts.attentions}


@contextmanager
def _recording(model: Any, parts: Parts) -> Iterator[None]:
    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        setattr(module, _RECORDED, kwargs["position_embeddings"])

    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in parts.attentions]
    attends, training = model.config._attn_implementation_internal, model.training
    model.config._attn_implementation_internal = _RECORDING
    try:
        yield
    finally:
        model.config._attn_implementation_internal = attends
        model.train(training)
        for hook in hooks:
            hook.remove()
        for module in parts.attentions:
            if hasattr(module, _RECORDED):
                delattr(module, _RECORDED)


def _attend_and_record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cos, sin = getattr(module, _RECORDED)
    rotated = getattr(module, "use_rope", True)
    states = tuple(_turned_back(x, cos, sin) if rotated else x for x in (query, key))
    setattr(module, _RECORDED, tuple(x.float() for x in states))
    plain = NoPE(query.shape[-1], query.shape[1], scale=scaling)
    spec = replace(plain(query.device), softcap=softcap)
    out = attention(query, key, value, spec, causal=True, window=sliding_window)
    return out.transpose(1, 2), None


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What a rotation by tables was made from, however they were scaled."""
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    width = cos.shape[-1]
    turned = x[..., :width].float()
    first, second = turned.chunk(2, dim=-1)
    back = turned * cos - torch.cat((-second, first), dim=-1) * sin
    return torch.cat((back / (cos * cos + sin * sin), x[..., width:].float()), dim=-1)


AttentionInterface.register(_RECORDING, _attend_and_record)
