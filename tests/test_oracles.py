"""Other people's code, where it is right: transformers, x-transformers, PoPE-pytorch.

They compute angles in float32, so positions are small here; what they get wrong (grouped heads,
fewer queries than keys, masks with causality, casts) is tested against the papers elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import BACKENDS, refusal

B, H, T, D = 2, 4, 24, 32


def qkv(dtype: torch.dtype = torch.float64, heads: int = H, dim: int = D) -> list[Tensor]:
    return [torch.randn(B, heads, T, dim, dtype=dtype) for _ in range(3)]


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def able(case: str, dtype: torch.dtype = torch.float32) -> pytest.MarkDecorator:
    names = [b for b in BACKENDS if refusal(case, b, "in_order", dtype=dtype) is None]
    return pytest.mark.parametrize("backend", names)


# transformers


def llama(head_dim: int, **parameters: Any) -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=head_dim * H,
        num_attention_heads=H,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **parameters},
    )


def rotated_by_transformers(config: Any, q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Their scores before the scale."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    cos, sin = LlamaRotaryEmbedding(config)(q, at.expand(B, -1))
    rotated_q, rotated_k = apply_rotary_pos_emb(q, k, cos, sin)
    return rotated_q @ rotated_k.mT


@pytest.mark.parametrize("base", [10000.0, 500_000.0])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_rope_is_that_of_llama(dim: int, base: float) -> None:
    config = llama(dim, rope_theta=base)
    q, k, _ = qkv(dim=dim)
    at = torch.randint(0, 300, (T,))
    wanted = rotated_by_transformers(config, q, k, at) * dim**-0.5
    spec = ww.RoPE(dim, H, base=base)()
    close(ww.scores(q, k, spec, query_positions=at, key_positions=at), wanted, 2e-4)


@pytest.mark.parametrize("dim, fraction", [(64, 0.25), (80, 0.1), (32, 0.5), (64, 1.0)])
def test_partial_rope_is_that_of_gpt_neox(dim: int, fraction: float) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import (
        GPTNeoXRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = GPTNeoXConfig(
        hidden_size=dim * H,
        num_attention_heads=H,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": fraction,
        },
    )
    q, k, _ = qkv(dim=dim)
    at = torch.randint(0, 300, (T,))
    cos, sin = GPTNeoXRotaryEmbedding(config)(q, at.expand(B, -1))
    assert cos.shape[-1] == round(fraction * dim)
    rotated_q, rotated_k = apply_rotary_pos_emb(q, k, cos, sin)
    spec = ww.RoPE(dim, H, fraction=fraction)()
    got = ww.scores(q, k, spec, query_positions=at, key_positions=at)
    close(got, rotated_q @ rotated_k.mT * dim**-0.5, 2e-4)


# Short and long, narrow and wide: with both ends of the ramp inside, clamped, and on one place.
YARN = [
    *((factor, 4096, 10000.0, 128) for factor in (1.0, 1.5, 2.0, 4.0, 16.0, 64.0)),
    *((8.0, length, 10000.0, 64) for length in (64, 128, 256, 1024, 2048, 32768)),
    *((10.0, 1024, base, 64) for base in (100.0, 1000.0, 500_000.0, 1_000_000.0)),
    *((4.0, 128, 10000.0, dim) for dim in (2, 4, 8, 16, 32, 256)),
    (10.0, 16, 10000.0, 32),
    (10.0, 4, 10000.0, 32),
]


@pytest.mark.parametrize("factor, length, base, dim", YARN)
def test_yarn_is_that_of_transformers(factor: float, length: int, base: float, dim: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = llama(
        dim,
        rope_type="yarn",
        rope_theta=base,
        factor=factor,
        original_max_position_embeddings=length,
    )
    wanted, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    spec = ww.YaRN(dim, H, train_length=length, factor=factor, base=base)()
    assert spec.inv_freq is not None
    torch.testing.assert_close(spec.inv_freq[0].float(), wanted, rtol=2e-5, atol=0)
    # Both cos and sin carry the factor there, for q and for k; here it is in the scale.
    assert spec.scale == pytest.approx(dim**-0.5 * attention_factor**2, rel=1e-12)
    q, k, _ = qkv(dim=dim)
    at = torch.randint(0, 300, (T,))
    theirs = rotated_by_transformers(config, q, k, at) * dim**-0.5
    close(ww.scores(q, k, spec, query_positions=at, key_positions=at), theirs, 5e-4)


@able("rope")
def test_attention_is_that_of_a_llama_layer(backend: str) -> None:
    """Grouped heads, causal mask, scale, all of it: weights of their layer, attention of ours."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = llama(D)
    config.num_key_value_heads = 2
    config._attn_implementation = "eager"
    layer = LlamaAttention(config, layer_idx=0).eval()
    x, at = torch.randn(B, T, D * H), torch.arange(T)
    mask = torch.full((T, T), float("-inf")).triu(1).expand(B, 1, T, T)
    with torch.no_grad():
        place = LlamaRotaryEmbedding(config)(x, at.expand(B, -1))
        wanted, _ = layer(x, place, mask)
        q, k, v = (
            project(x).view(B, T, -1, D).transpose(1, 2)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        out = ww.attention(q, k, v, ww.RoPE(D, H)(), causal=True, backend=backend)
        got = layer.o_proj(out.transpose(1, 2).reshape(B, T, -1))
    close(got, wanted)


# x-transformers


def interleaved(x: Tensor) -> Tensor:
    """Pairs (c, c + R) as pairs (2c, 2c + 1), as x-transformers has them."""
    first, second = x.chunk(2, dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def test_rotary_is_that_of_x_transformers() -> None:
    theirs = pytest.importorskip("x_transformers.x_transformers", reason="no x-transformers")
    q, k, _ = qkv()
    freqs, _ = theirs.RotaryEmbedding(D).forward_from_seq_len(T)
    rotated = [theirs.apply_rotary_pos_emb(interleaved(x), freqs) for x in (q, k)]
    close(ww.scores(q, k, ww.RoPE(D, H)()), rotated[0] @ rotated[1].mT * D**-0.5)


@pytest.mark.parametrize("rotated", [8, 16])
def test_partial_rotary_is_that_of_x_transformers(rotated: int) -> None:
    theirs = pytest.importorskip("x_transformers.x_transformers", reason="no x-transformers")
    q, k, _ = qkv()
    freqs, _ = theirs.RotaryEmbedding(rotated).forward_from_seq_len(T)
    both = [
        theirs.apply_rotary_pos_emb(
            torch.cat((interleaved(x[..., :rotated]), x[..., rotated:]), dim=-1), freqs
        )
        for x in (q, k)
    ]
    spec = ww.RoPE(D, H, fraction=rotated / D)()
    close(ww.scores(q, k, spec), both[0] @ both[1].mT * D**-0.5)


@pytest.mark.parametrize("heads, sloped", [(4, 4), (8, 8), (6, 6), (12, 12), (8, 4), (20, 20)])
def test_alibi_is_that_of_x_transformers(heads: int, sloped: int) -> None:
    theirs = pytest.importorskip("x_transformers.x_transformers", reason="no x-transformers")
    bias = theirs.AlibiPositionalBias(heads=sloped, total_heads=heads)(T, T)
    q = torch.zeros(1, heads, T, D)
    got = ww.scores(q, q, ww.ALiBi(D, heads, fraction=sloped / heads)())[0]
    # Theirs falls on both sides, ours is what causal attention sees.
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    close(got[:, seen], bias.view(heads, T, T)[:, seen])


@pytest.mark.parametrize("heads", [3, 4])
def test_pope_is_that_of_x_transformers(heads: int) -> None:
    """A whole attention layer of theirs; it scales by d^-1/2 as we do (2.31.10)."""
    theirs = pytest.importorskip("x_transformers.x_transformers", reason="no x-transformers")
    layer = theirs.Attention(dim=48, heads=heads, dim_head=D, causal=True, flash=False).eval()
    polar = theirs.PolarEmbedding(D, heads)
    torch.nn.init.uniform_(polar.learned_bias, -6, 0)
    encoding = ww.PoPE(D, heads)
    with torch.no_grad():
        encoding.delta.copy_(polar.learned_bias[:, 0])  # type: ignore[union-attr]
        x = torch.randn(B, T, 48)
        wanted = layer(x, polar_pos_emb=polar(torch.arange(T)))
        q, k, v = (
            project(x).view(B, T, heads, D).transpose(1, 2)
            for project in (layer.to_q, layer.to_k, layer.to_v)
        )
        out = ww.attention(q, k, v, encoding(), causal=True)
        got = layer.to_out(out.transpose(1, 2).reshape(B, T, -1))
    close(got, wanted if isinstance(wanted, Tensor) else wanted[0])


# PoPE-pytorch, unfused


def pope_pytorch(rotated: int = D, **options: Any) -> tuple[Any, ww.PoPE]:
    """Theirs and ours with the same delta; float64 frequencies for theirs."""
    package = pytest.importorskip("PoPE_pytorch", reason="PoPE-pytorch is not installed")
    exact = torch.tensor([10000.0 ** -(c / rotated) for c in range(rotated)], dtype=torch.float64)
    theirs = package.PoPE(rotated, heads=H, inv_freqs=exact).double()
    ours = ww.PoPE(D, H, **options).double()
    with torch.no_grad():
        theirs.bias.uniform_(-6, 0)
        ours.delta.copy_(theirs.bias)  # type: ignore[union-attr]
    return theirs, ours


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_pope_scores_are_those_of_pope_pytorch(fraction: float) -> None:
    rotated = round(fraction * D)
    theirs, ours = pope_pytorch(rotated, fraction=fraction, rest="raw")
    q, k, _ = qkv()
    widened = theirs.apply_pope_to_qk(theirs(T), q, k)
    close(ww.scores(q, k, ours()), widened[0] @ widened[1].mT * D**-0.5, 1e-10)


@able("pope", torch.float64)
def test_pope_attention_is_that_of_pope_pytorch(backend: str) -> None:
    theirs, ours = pope_pytorch()
    from PoPE_pytorch import flash_attn_with_pope

    q, k, v = qkv()
    with torch.no_grad():
        wanted = flash_attn_with_pope(q, k, v, pos_emb=theirs(T), causal=True, fused=False)
        close(ww.attention(q, k, v, ours(), causal=True, backend=backend), wanted, 1e-10)
        # Not causal, masked by key.
        mask = torch.rand(B, T) < 0.7
        mask[:, 0] = True
        wanted = flash_attn_with_pope(q, k, v, pos_emb=theirs(T), mask=mask, fused=False)
        close(ww.attention(q, k, v, ours(), key_mask=mask), wanted, 1e-10)


def test_pope_gradients_are_those_of_pope_pytorch() -> None:
    theirs, ours = pope_pytorch()
    from PoPE_pytorch import flash_attn_with_pope

    start, flow = qkv(), torch.randn(B, H, T, D, dtype=torch.float64)
    found = []
    for phase in (theirs.bias, ours.delta):
        q, k, v = (x.clone().requires_grad_() for x in start)
        if phase is ours.delta:
            out = ww.attention(q, k, v, ours(), causal=True, backend="reference")
        else:
            out = flash_attn_with_pope(q, k, v, pos_emb=theirs(T), causal=True, fused=False)
        assert phase is not None
        found.append(torch.autograd.grad(out, (q, k, v, phase), flow))
    for got, wanted in zip(found[1], found[0], strict=True):
        close(got, wanted, 1e-9)
