"""The public names of PoPE-pytorch 0.2.1 over our attention.

Signatures, layouts, head grouping and state dicts are theirs; docs/compat.md lists where results
differ and why.

Examples:
    >>> from whatwhere.compat.pope_pytorch import PoPE, flash_attn_with_pope
    >>> pope = PoPE(64, heads=8)
    >>> q = k = v = torch.randn(2, 8, 16, 64)
    >>> flash_attn_with_pope(q, k, v, pos_emb=pope(16), causal=True).shape
    torch.Size([2, 8, 16, 64])
"""

from whatwhere.compat.pope_pytorch.attend import compute_attn_similarity, flash_attn_with_pope
from whatwhere.compat.pope_pytorch.modules import AxialPoPE, PoPE
from whatwhere.compat.pope_pytorch.polar import PolarEmbedReturn, apply_pope_to_qk

__all__ = [
    "AxialPoPE",
    "PoPE",
    "PolarEmbedReturn",
    "apply_pope_to_qk",
    "compute_attn_similarity",
    "flash_attn_with_pope",
]
