"""PoPE's learned phases."""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

from whatwhere.analysis import frames
from whatwhere.analysis.layers import find_layers

DELTA = ("layer", "head", "channel", "frequency", "delta")


@torch.no_grad()
def learned_delta(model: nn.Module) -> pd.DataFrame:
    """The bounded ``delta`` of every layer, head and frequency (arXiv 2509.10534, section 3).

    ``delta`` is in ``[-2 pi, 0]`` radians. Since the score has ``cos((s - t) theta + delta)``, a
    channel's is largest for keys ``(2 pi + delta) / theta`` positions before the query, and every
    whole turn ``2 pi / theta`` further back; for ``delta = 0`` at the query itself as well.

    Args:
        model: Of `whatwhere.models`, or converted.

    Returns:
        Columns layer, head, channel, frequency (radians per position), delta. Layers without a
        phase have no rows.

    Raises:
        NoAttentionError: If the model has no attention layer.
    """
    parts = []
    for layer in find_layers(model):
        spec = None if layer.encoding is None else layer.encoding()
        if spec is None or spec.phase is None or spec.inv_freq is None:
            continue
        phase = spec.phase.detach().double().cpu()
        frequency = dict(enumerate(spec.inv_freq[0].tolist()))
        axes = {"head": range(phase.shape[0]), "channel": range(phase.shape[1])}
        part = frames.table(axes, {"delta": phase})
        parts.append(part.assign(layer=layer.index, frequency=part["channel"].map(frequency)))
    return frames.joined(parts, DELTA)
