"""The blocks of the decoder: pre-norm attention and MLP, RMSNorm, no biases."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from whatwhere.attention import attention, encode_keys, encode_queries, unturned
from whatwhere.models.cache import choose_form
from whatwhere.models.configuration import WhatWhereConfig
from whatwhere.models.layer_encodings import make_layer_encoding
from whatwhere.models.layout import Layout
from whatwhere.spec import ScoreSpec

Observer = Callable[[nn.Module, Tensor, Tensor, ScoreSpec, Layout], None]
"""Is shown queries ``(B, H, T, D)`` and keys ``(B, G, T, D)`` before each call of attention."""


class ResidualLinear(nn.Linear):
    """A projection into the residual stream, which starts smaller: by ``1 / sqrt(2 L)``."""


class WhatWhereAttention(nn.Module):
    """Causal attention of one layer, with the layer's position encoding.

    Args:
        config: The model's shape.
        layer: Index of the layer, also in caches.

    Attributes:
        observer: Called by each forward pass, for `whatwhere.analysis`; ``None`` otherwise.
    """

    def __init__(self, config: WhatWhereConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.head_dim = config.head_dim
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, heads, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = ResidualLinear(heads, width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.encoding = make_layer_encoding(config, layer)
        self.observer: Observer | None = None

    def forward(self, hidden: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """``(B, T, hidden_size)`` to the same."""
        split = (-1, self.head_dim)
        q = self.q_proj(hidden).unflatten(-1, split)
        k = self.k_proj(hidden).unflatten(-1, split)
        v = self.v_proj(hidden).unflatten(-1, split).transpose(1, 2)
        if self.config.qk_norm:
            # Autocast runs the norm in float32; attention wants one dtype.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = self._attend(q.transpose(1, 2), k.transpose(1, 2), v, layout, cache)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, cache: Cache | None
    ) -> Tensor:
        spec = self.encoding(q.device)
        if self.observer is not None:
            self.observer(self, q, k, spec, layout)
        if layout.context is not None:
            # Positions that restart matter to a length temperature alone: see `Layout.at`.
            restarting = spec.temperature_length is not None
            return layout.context.attend(
                q,
                k,
                v,
                spec,
                positions=layout.key_positions if restarting else None,
                segments=layout.segments,
                window=self.config.sliding_window,
                backend=self.config.attention_backend,
            )
        query_positions, key_positions = layout.at(spec)
        if cache is not None:
            if choose_form(self.config.cache_form, spec, q.device)[0] == "encoded":
                q = encode_queries(q, spec, layout.positions)
                k = encode_keys(k, spec, layout.positions)
                spec = spec.encoded()
            else:
                q, k, spec = unturned(q, spec), unturned(k, spec), spec.unturned()
            keys, values = cache.update(k, v, self.layer)
            if not layout.fresh:
                k, v = keys, values
        return attention(
            q,
            k,
            v,
            spec,
            causal=True,
            query_positions=query_positions,
            key_positions=key_positions,
            key_mask=layout.key_mask,
            segments=layout.segments,
            window=self.config.sliding_window,
            backend=self.config.attention_backend,
        )


class WhatWhereMLP(nn.Module):
    """``down(gelu(up(x)))``, or SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: WhatWhereConfig) -> None:
        super().__init__()
        width, inside = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inside, bias=False) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(width, inside, bias=False)
        self.down_proj = ResidualLinear(inside, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(B, T, hidden_size)`` to the same."""
        up = self.up_proj(hidden)
        inner = F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(hidden)) * up
        out: Tensor = self.down_proj(inner)
        return out


class WhatWhereBlock(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with dropout on what is added."""

    def __init__(self, config: WhatWhereConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = WhatWhereAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = WhatWhereMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden: Tensor, layout: Layout, past_key_values: Cache | None = None
    ) -> Tensor:
        """``(B, T, hidden_size)`` to the same."""
        mixed = self.self_attn(self.input_layernorm(hidden), layout, past_key_values)
        hidden = hidden + self.dropout(mixed)
        added: Tensor = self.dropout(self.mlp(self.post_attention_layernorm(hidden)))
        return hidden + added
