"""Which form of keys a layer's cache keeps, and what that costs.

The containers are transformers' own (`DynamicCache`, `StaticCache`, ...), so that beam search,
cropping and offloading work as for any model. What is put into them is decided here:

- ``"encoded"``: features made once per token at its position. A decoding step encodes only the
  new token, but polar features are up to ``2 D`` numbers wide.
- ``"raw"``: the ``D`` channels of a key, of polar scores their magnitudes. Every step turns all of
  them again, to positions counted from the attention mask, which pays only in a kernel that
  turns them while it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from whatwhere.attention import cache_form
from whatwhere.spec import ScoreSpec

Form = Literal["encoded", "raw"]


@dataclass(frozen=True)
class LayerCache:
    """What one layer's cache keeps.

    Attributes:
        layer: Its index.
        encoding: Name of its position encoding.
        form: ``"encoded"`` or ``"raw"`` keys.
        numbers_per_token: Keys and values of all heads together.
        reason: Why this form.
    """

    layer: int
    encoding: str
    form: Form
    numbers_per_token: int
    reason: str

    def __str__(self) -> str:
        return (
            f"layer {self.layer} ({self.encoding}): {self.form} keys, "
            f"{self.numbers_per_token} numbers per token; {self.reason}"
        )


def choose_form(wanted: str, spec: ScoreSpec, device: torch.device) -> tuple[Form, str]:
    """The form of keys that a layer's cache keeps on a device, and why.

    Args:
        wanted: ``cache_form`` of the config; decides unless it is ``"auto"``.
        spec: The layer's score.
        device: Where decoding takes place.
    """
    if wanted == "encoded":
        return "encoded", "cache_form='encoded' in the config"
    if wanted == "raw":
        return "raw", "cache_form='raw' in the config"
    if spec.feature == "identity":
        return "encoded", "this encoding leaves keys as they are, both forms are the same"
    form = cache_form(spec, device)
    if form == "raw":
        return form, f"a backend on {device.type} rotates keys while it reads them"
    return form, f"no backend on {device.type} rotates keys while it reads them"


def report_layer(
    wanted: str,
    layer: int,
    encoding: str,
    spec: ScoreSpec,
    device: torch.device,
    key_heads: int,
    head_dim: int,
) -> LayerCache:
    """What the cache of one layer keeps on a device.

    Args:
        wanted: As for `choose_form`.
        layer: Its index.
        encoding: Name of its position encoding.
        spec: Its score.
        device: Where decoding takes place.
        key_heads: ``G``.
        head_dim: ``D``.
    """
    form, reason = choose_form(wanted, spec, device)
    width = spec.feature_dim(head_dim) if form == "encoded" else head_dim
    numbers = key_heads * (width + head_dim)
    return LayerCache(layer, encoding, form, numbers, reason)
