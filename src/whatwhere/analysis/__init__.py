"""Why a model fails at length: measurements of any causal language model, ours or not.

Examples:
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch, whatwhere as ww
    >>> config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64,
    ...                      num_hidden_layers=2, num_attention_heads=2)
    >>> found = ww.analysis.trace(LlamaForCausalLM(config), torch.randint(256, (1, 64)), (32, 64))
    >>> found.geometry().shape
    (32, 9)
"""

from whatwhere.analysis.capture import Seen, observed
from whatwhere.analysis.cost import cost
from whatwhere.analysis.delta import learned_delta
from whatwhere.analysis.geometry import (
    Moments,
    centroid_cosine,
    silhouette,
    singular_share,
    stable_rank,
)
from whatwhere.analysis.in_distribution import SafeLength, in_distribution, safe_length
from whatwhere.analysis.layers import AttentionLayer, NoAttentionError, NotFiniteError
from whatwhere.analysis.retrieval import Item, copy_chance, copy_items, retrieval, without_copy
from whatwhere.analysis.tracing import Trace, attention_weights, trace

__all__ = [
    "AttentionLayer",
    "Item",
    "Moments",
    "NoAttentionError",
    "NotFiniteError",
    "SafeLength",
    "Seen",
    "Trace",
    "attention_weights",
    "centroid_cosine",
    "copy_chance",
    "copy_items",
    "cost",
    "in_distribution",
    "learned_delta",
    "observed",
    "retrieval",
    "safe_length",
    "silhouette",
    "singular_share",
    "stable_rank",
    "trace",
    "without_copy",
]
