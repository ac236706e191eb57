"""The parts of a diagnosis: each measures one model and gives tables and notes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from whatwhere.lab.console import counting
from whatwhere.lab.data import spaced_windows
from whatwhere.lab.data.sources import read_corpus
from whatwhere.lab.data.tokens import Tokens
from whatwhere.lab.diagnose.needles import needle_items
from whatwhere.lab.diagnose.settings import Settings
from whatwhere.lab.diagnose.subjects import Subject, count
from whatwhere.lab.evaluate import MAX_TOKENS, length_loss

if TYPE_CHECKING:
    from whatwhere.analysis import Item

POINTS = 512
"""Keys and queries of a head that are drawn."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEY = VALUE = 8
"""Tokens of the key that is said again, and of what was said after it."""

Result = tuple[dict[str, pd.DataFrame], dict[str, Any]]


@dataclass
class Work:
    """One model at work; it is loaded when a part first asks for it.

    Attributes:
        subject: The model.
        settings: Of the diagnosis.
        tokens: The text.
        train_length: Tokens that the model was trained at, if known.
        device: Where it runs.
    """

    subject: Subject
    settings: Settings
    tokens: Tokens
    train_length: int | None
    device: torch.device
    _model: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        if self._model is None:
            self._model = self.subject.load(self.settings.dtype, self.device)
        return self._model

    def release(self) -> None:
        """Let go of the model, for another one's sake."""
        self._model = None

    @property
    def lengths(self) -> list[int]:
        """In tokens, rising."""
        return list(self.settings.rising)


def trace(work: Work) -> Result:
    """Geometry, scores, use of frequencies, what and where: one pass over the texts."""
    from whatwhere import analysis

    model, settings = work.model, work.settings
    windows = count(work.tokens, settings)
    ids = spaced_windows(work.tokens, work.lengths[-1], windows)
    layers = len(analysis.layers.find_layers(model))
    passes = -(-windows // settings.batch_size)
    with counting(f"{work.subject.label}: layers", layers * passes) as counter:
        found = analysis.trace(
            model,
            ids,
            work.lengths,
            batch_size=settings.batch_size,
            points=POINTS,
            progress=lambda _: counter.advance(""),
        )
    clusters, points = found.clusters(), found.points()
    chosen, rule = choose(clusters, work.lengths, work.train_length, settings)
    heads = pd.MultiIndex.from_frame(points[["layer", "head"]])
    frames = {
        "geometry": found.geometry(),
        "clusters": clusters,
        "scores": found.scores(),
        "frequency_usage": found.frequency_usage(),
        "what_where": found.what_where(),
        "points": points[heads.isin(chosen)],
        "learned_delta": analysis.learned_delta(model),
    }
    features = sorted({layer.feature for layer in found.layers})
    notes = {"texts": windows, "heads": [list(one) for one in chosen], "rule": rule}
    return frames, notes | {"features": features, "layers": len(found.layers)}


def loss(work: Work) -> Result:
    """Loss at each length over the very texts that the trace reads, cut into windows of it.

    What differs between lengths is then how much a token has before it, not which tokens there
    are; a text that is no multiple of a length loses its first ones there.
    """
    model, rows = work.model, []
    texts = spaced_windows(work.tokens, work.lengths[-1], count(work.tokens, work.settings))
    with counting(f"{work.subject.label}: loss", len(work.lengths)) as counter:
        for length in work.lengths:
            each = texts.shape[1] // length
            windows = texts[:, -each * length :].reshape(-1, length)
            found = length_loss(model, windows)
            rows.append((length, found.windows, found.windows * (length - 1), found.loss))
            counter.advance(f"{length:,} tokens: {found.loss:.4f}")
    return {
        "loss_by_length": pd.DataFrame(rows, columns=["length", "windows", "tokens", "loss"])
    }, {}


def angles(work: Work) -> Result:
    """Angles that training did not show, and the safe length that follows from them."""
    from whatwhere.analysis import layers
    from whatwhere.analysis.in_distribution import in_distribution, safe_length

    if work.train_length is None:
        why = "the training length is not known: give --train-length"
        return {"in_distribution": pd.DataFrame({"layer": []})}, {"missing": why}
    # A config knows, too, with which frequencies its length was trained: YaRN's are others now.
    own = work.settings.train_length is None and layers.train_length(work.model) is not None
    known = None if own else work.train_length
    try:
        table = in_distribution(work.model, work.lengths, known)
        safe = safe_length(work.model, known)
    except ValueError as error:  # a config that says nothing of positions that is understood
        return {"in_distribution": pd.DataFrame({"layer": []})}, {"missing": str(error)}
    return {"in_distribution": table}, {"safe_length": safe.length, "safe_reason": safe.reason}


def cost(work: Work) -> Result:
    """Tables, cache and operations."""
    from whatwhere.analysis.cost import cost as measure

    try:
        return {"cost": measure(work.model, work.lengths)}, {}
    except (ValueError, RuntimeError) as error:  # the second, if it cannot run without numbers
        said = str(error).splitlines()[0]
        return {"cost": pd.DataFrame({"length": []})}, {"missing": said}


def retrieval(work: Work) -> Result:
    """Whether what is hidden at a depth of the text is found."""
    from whatwhere.analysis.retrieval import retrieval as measure

    items, left_out = _items(work)
    notes = {"ask": _asked(work), "left_out": left_out}
    if not items:
        return {"retrieval": pd.DataFrame({"length": []})}, notes | {
            "missing": "; ".join(f"{length:,} tokens: {why}" for length, why in left_out)
        }
    with counting(f"{work.subject.label}: retrieval", len(items)) as counter:
        known = 0

        def show(done: int, _: int) -> None:
            nonlocal known
            for _ in range(done - known):
                counter.advance("")
            known = done

        most = max(work.lengths[-1] * work.settings.batch_size, MAX_TOKENS)
        table = measure(work.model, items, tokens_per_batch=most, progress=show)
    return {"retrieval": table}, notes


def _asked(work: Work) -> str:
    if work.settings.ask != "auto":
        return work.settings.ask
    return "copy" if work.subject.tokenizer == "bytes" else "needle"


def _items(work: Work) -> tuple[list[Item], list[tuple[int, str]]]:
    # What is asked, and lengths that have no room for it or not enough text, with the reason.
    from whatwhere.analysis.retrieval import copy_items

    settings = work.settings
    given: dict[str, Any] = {"items": settings.needles, "seed": settings.seed}
    make: Callable[[int], list[Item]]
    if _asked(work) == "copy":
        tokens = torch.from_numpy(work.tokens.astype("int64"))
        make = lambda n: copy_items(tokens, [n], DEPTHS, key=KEY, value=VALUE, **given)  # noqa: E731
    else:
        corpus = read_corpus(settings.text)
        text = "\n".join(document.text.decode() for document in corpus.documents)
        tokenizer = work.subject.load_tokenizer()
        make = lambda n: needle_items(text, tokenizer, [n], DEPTHS, **given)  # noqa: E731
    items: list[Item] = []
    left_out: list[tuple[int, str]] = []
    for length in work.lengths:
        try:
            items += make(length)
        except ValueError as error:
            left_out.append((length, str(error)))
    return items, left_out


PARTS: dict[str, Callable[[Work], Result]] = {
    "trace": trace,
    "loss": loss,
    "angles": angles,
    "cost": cost,
    "retrieval": retrieval,
}


def choose(
    clusters: pd.DataFrame, lengths: list[int], train_length: int | None, settings: Settings
) -> tuple[list[tuple[int, int]], str]:
    """Heads whose keys and queries are drawn, and by which rule they were chosen.

    Those asked for; where a layer or a head alone is named, or none, the one among them whose
    silhouette after the encoding changes most from the training length to the longest length (with
    one length, the one with the largest).
    """
    after = clusters[clusters["stage"] == "after"]
    if settings.layers:
        after = after[after["layer"].isin(settings.layers)]
    if settings.heads:
        after = after[after["head"].isin(settings.heads)]
    if settings.layers and settings.heads:
        pairs = after[["layer", "head"]].drop_duplicates()
        return [(int(a), int(b)) for a, b in pairs.itertuples(index=False)], "asked for"
    grid = after.pivot_table(index=["layer", "head"], columns="length", values="silhouette")
    within = [n for n in lengths if train_length and n <= train_length]
    base = within[-1] if within else lengths[0]
    if base == lengths[-1]:
        ranked, rule = grid[base], "its silhouette is the largest"
    else:
        ranked = (grid[lengths[-1]] - grid[base]).abs()
        rule = f"its silhouette changes most from {base:,} to {lengths[-1]:,} tokens"
    groups = ranked.groupby(level="layer" if settings.layers else "head")
    named = settings.layers or settings.heads
    best: list[Any] = list(groups.idxmax()) if named else [ranked.idxmax()]
    if any(isinstance(one, float) and math.isnan(one) for one in best):
        raise ValueError("trace: no head has a silhouette")
    return [(int(a), int(b)) for a, b in best], rule
