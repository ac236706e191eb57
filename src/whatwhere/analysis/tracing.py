"""`trace`: one pass of a model over texts, and every measurement of it by one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from whatwhere.analysis import content, frames, geometry, scatter, scores
from whatwhere.analysis.capture import Seen, observed
from whatwhere.analysis.in_distribution import check_lengths
from whatwhere.analysis.layers import (
    AttentionLayer,
    NotFiniteError,
    first_broken,
    table_length,
    text_config,
    train_length,
)


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What was measured in one layer, by text; names and shapes are those of each module.

    Attributes:
        clouds: Of `whatwhere.analysis.geometry`.
        scores: Of `whatwhere.analysis.scores`.
        content: Of `whatwhere.analysis.content`; ``None`` where nothing turns in a known way.
        scatter: Of `whatwhere.analysis.scatter`, of the first text; ``None`` if not asked for.
    """

    clouds: dict[str, Tensor]
    scores: dict[str, Tensor]
    content: content.Content | None
    scatter: scatter.Scatter | None


@dataclass(frozen=True, eq=False)
class Trace:
    """The measurements of one model; make one with `trace`.

    Attributes:
        layers: The attention layers.
        lengths: At which clouds and scores were measured, rising.
        texts: ``B``.
        tokens: ``T`` of each text.
        train_length: At which the model was trained, as far as its config says.
        measured: What was measured, for each layer one entry for each batch of texts.
    """

    layers: list[AttentionLayer]
    lengths: tuple[int, ...]
    texts: int
    tokens: int
    train_length: int | None
    measured: list[list[LayerTrace]]

    def geometry(self) -> pd.DataFrame:
        """Singular share, stable rank, norms of clouds against length: `geometry.Moments`.

        Columns: layer, head (of keys a key head), side (query, key), stage (before, after the
        encoding), length, singular_share, stable_rank, centroid_norm, rms_norm; of the first
        ``length`` tokens, means over texts.
        """
        return frames.clouds(self.layers, self.lengths, self._mean_clouds(geometry.CLOUD))

    def clusters(self) -> pd.DataFrame:
        """Where keys and queries lie to one another against length.

        Columns: layer, head, stage, length, centroid_cosine (`geometry.centroid_cosine`),
        silhouette (`geometry.silhouette`).
        """
        return frames.pairs(self.layers, self.lengths, self._mean_clouds(geometry.PAIR))

    def scores(self) -> pd.DataFrame:
        """Sink mass, largest score, share of positive scores: `scores.measure`.

        Columns: layer, head, stage, length, queries (how many, by text), sink_mass, largest_score,
        positive_share; over queries at positions from the length before up to ``length``.
        """
        means = [
            {
                name: torch.cat([part.scores[name] for part in parts], dim=1).nanmean(1)
                for name in scores.NAMES
            }
            for parts in self.measured
        ]
        return frames.scores(self.layers, self.lengths, means)

    def frequency_usage(self) -> pd.DataFrame:
        """Mean length of each rotary pair, or magnitude of each polar channel that turns.

        Figure 3 of arXiv 2509.10534. Columns: layer, head (of keys a key head), side, channel,
        frequency (radians per position), norm; means over tokens and texts. Layers in which
        nothing turns have no rows.
        """
        found = []
        for layer, parts in zip(self.layers, self.measured, strict=True):
            known = [part.content for part in parts if part.content is not None]
            if known:
                query = torch.cat([c.query_norm for c in known]).mean(0)
                key = torch.cat([c.key_norm for c in known]).mean(0)
                found.append(frames.usage(layer, query, key))
        return frames.joined(found, frames.USAGE)

    def what_where(self) -> pd.DataFrame:
        """How far content moves the place of a key's best score: `content.measure`.

        Columns: layer, head, content_shift (0 to 1), offset_shift (tokens); means over texts, NaN
        where nothing turns.
        """
        found = []
        for layer, parts in zip(self.layers, self.measured, strict=True):
            known = [part.content for part in parts if part.content is not None]
            empty = torch.full((1, layer.heads), torch.nan)
            shifts = torch.cat([c.content_shift for c in known] or [empty]).mean(0)
            offsets = torch.cat([c.offset_shift for c in known] or [empty]).mean(0)
            found.append(frames.shifts(layer, shifts, offsets))
        return frames.joined(found, frames.SHIFTS)

    def points(self) -> pd.DataFrame:
        """Keys and queries of the first text on their two principal axes: `scatter.measure`.

        Columns: layer, head, stage, length (the first of `lengths` that holds the position), side
        (query, key, origin), position (-1 for the origin), x, y, x_share, y_share (of variance).
        """
        found = []
        for layer, parts in zip(self.layers, self.measured, strict=True):
            if parts[0].scatter is not None:
                found.append(frames.points(layer, self.lengths, parts[0].scatter))
        return frames.joined(found, frames.POINTS)

    def _mean_clouds(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        return [
            {
                name: torch.cat([part.clouds[name] for part in parts], dim=1).mean(1)
                for name in names
            }
            for parts in self.measured
        ]


@torch.no_grad()
def trace(
    model: nn.Module,
    input_ids: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    batch_size: int = 1,
    points: int = 128,
    samples: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run a model over texts once and measure every attention layer while it runs.

    The model stays as it is, and its outputs are those it gives without being traced. Statistics
    are computed in float64; memory beyond that of the forward pass grows with ``T``, not with its
    square. Since a causal model's features of the first ``n`` tokens do not hang on those after
    them, one pass over ``T`` tokens serves all lengths. (Rotations that are made anew for longer
    inputs, ``dynamic`` and ``longrope`` of transformers, are those of ``T`` tokens.)

    Args:
        model: A decoder of `whatwhere.models`, a converted one, or any of transformers.
        input_ids: ``(B, T)`` token ids of ``B`` texts, or ``(T,)``, without padding.
        lengths: At which to measure, each from 2 to ``T``; ``T`` alone by default.
        batch_size: Texts in one forward pass.
        points: Keys and queries of a head that `Trace.points` shows, 0 for none.
        samples: See `content.measure`.
        progress: Called after each layer with the number of layers done, over all passes.

    Raises:
        NoAttentionError: If the model has no attention layer that can be observed.
        NotFiniteError: If a layer computes NaN or infinity.
        ValueError: If token ids or lengths do not fit one another or the model.
    """
    ids, chosen = _checked(model, input_ids, lengths)
    measured: list[list[LayerTrace]] = []

    def observe(seen: Seen) -> None:
        layer = seen.layer.index
        while len(measured) <= layer:
            measured.append([])
        first = points > 0 and not measured[layer]
        measured[layer].append(
            LayerTrace(
                geometry.measure(seen, chosen),
                scores.measure(seen, chosen),
                content.measure(seen, samples),
                scatter.measure(seen, points) if first else None,
            )
        )
        if progress is not None:
            progress(sum(map(len, measured)))

    with _evaluating(model), observed(model, observe) as layers:
        for part in ids.split(batch_size):
            run(model, part)
    used = [layer for layer in layers if layer.index < len(measured) and measured[layer.index]]
    return Trace(
        used,
        chosen,
        ids.shape[0],
        ids.shape[1],
        train_length(model),
        [measured[layer.index] for layer in used],
    )


@torch.no_grad()
def attention_weights(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """Attention weights of every layer, from what `trace` sees: ``(B, H, T, T)`` float64.

    For short texts: this keeps what `trace` never does. It works where the model's own kernels
    keep no weights, and checks what is traced where they do.

    Raises:
        ValueError: As `trace`.
    """
    ids, _ = _checked(model, input_ids, None)
    found: list[Tensor] = []

    def observe(seen: Seen) -> None:
        batch, heads, length = seen.queries.shape[:3]
        whole = torch.zeros(batch, heads, length, length, dtype=torch.float64)
        for block in scores.blocks(seen, torch.float64):
            at = (block.text, block.heads, block.rows, block.columns)
            whole[at] = block.weights().cpu()
        found.append(whole)

    with _evaluating(model), observed(model, observe):
        run(model, ids)
    return found


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states of the last layer, without logits, which take more memory than all else.

    Raises:
        NotFiniteError: If they hold NaN or infinity.
    """
    inner: nn.Module = getattr(model, "base_model", model)
    out: Any = inner(input_ids=ids, use_cache=False)
    last = getattr(out, "last_hidden_state", None)
    last = out.logits if last is None else last
    if not bool(last.isfinite().all()):
        broken = first_broken(model)
        cause = f"its weights {broken} hold some" if broken else "its weights are finite"
        raise NotFiniteError(
            f"model: what follows the last attention layer gives NaN or infinity ({cause})"
        )
    return cast(Tensor, last)


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _checked(
    model: nn.Module, input_ids: Any, lengths: Sequence[int] | None
) -> tuple[Tensor, tuple[int, ...]]:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids is {_kind(input_ids)}: expected integers, (B, T) or (T,)")
    ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: expected (B, T) with at least 2 tokens"
        )
    total = ids.shape[1]
    chosen = (total,) if lengths is None else tuple(sorted(set(check_lengths(lengths))))
    if chosen[0] < 2 or chosen[-1] > total:
        raise ValueError(f"lengths={list(chosen)}: expected 2 to {total}, the tokens of a text")
    table = table_length(model)
    if table is not None and total > table:
        raise ValueError(
            f"input_ids has {total} tokens: beyond the model's table of positions, which ends at "
            f"{table}"
        )
    words = getattr(text_config(model), "vocab_size", None)
    if words is not None and (int(ids.min()) < 0 or int(ids.max()) >= words):
        raise ValueError(
            f"input_ids has tokens from {int(ids.min())} to {int(ids.max())}: outside the model's "
            f"vocabulary of {words}"
        )
    # Offloaded weights have no device of their own: accelerate moves tokens to where it computes.
    place = next((p.device for p in model.parameters() if not p.is_meta), ids.device)
    return ids.to(place), chosen


def _kind(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
