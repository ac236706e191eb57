"""Why a model fails at length: measurements of any causal language model, ours or not.

>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> import torch, whatwhere as ww
>>> config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64,
...                      num_hidden_layers=2, num_attention_heads=2)
>>> found = ww.analysis.trace(LlamaForCausalLM(config), torch.randint(256, (1, 64)), (32, 64))
>>> found.geometry().shape
(32, 9)
"""

from whatwhere.analysis.capture import Seen, observed
from whatwhere.analysis.delta import learned_delta
from whatwhere.analysis.geometry import (
    Moments,
    centroid_cosine,
    silhouette,
    singular_share,
    stable_rank,
)
from whatwhere.analysis.layers import AttentionLayer, NoAttentionError, NotFiniteError
from whatwhere.analysis.tracing import Trace, attention_weights, trace

__all__ = [
    "AttentionLayer",
    "Moments",
    "NoAttentionError",
    "NotFiniteError",
    "Seen",
    "Trace",
    "attention_weights",
    "centroid_cosine",
    "learned_delta",
    "observed",
    "silhouette",
    "singular_share",
    "stable_rank",
    "trace",
]
