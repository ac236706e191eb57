"""The chain by which the RoPE-ID paper (arXiv 2603.18017) explains failure at length.

Rotations that training did not show spread the clusters of keys and queries (their stable rank
grows) until they meet, and the sink loses the attention that it had by default.
"""

from __future__ import annotations

from dataclasses import dataclass

from whatwhere.figures.palette import title
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.diagnose.words import Change, Finding, change, missing, no_span

RANK_GROWS = 1.25
"""Factor by which the stable rank must grow, and by more than it does before the encoding."""
CLUSTERS_MEET = 0.1
"""By which the silhouette, from -1 to 1, must fall."""
CLUSTERS_THERE = 0.25
"""Silhouette from which on keys and queries are called clusters: what Kaufman and Rousseeuw
("Finding Groups in Data", 1990) take for the least of a structure."""
SINK_FAILS = 0.25
"""Share of its attention that the first token must lose."""
SINK_THERE = 0.1
"""Attention on the first token from which on it is called a sink."""


@dataclass(frozen=True)
class Links:
    """The links of the chain, each a change of medians over layers and heads.

    Attributes:
        rank: Stable rank of keys after the encoding.
        before: The same before it.
        meet: Silhouette of keys against queries after the encoding.
        sink: Attention on the first token.
    """

    rank: Change
    before: Change
    meet: Change
    sink: Change

    @property
    def grows(self) -> bool:
        """Whether the encoding makes the rank grow: enough, and by more than it does before."""
        factor = self.rank.last / self.rank.first
        return factor >= RANK_GROWS and factor > self.before.last / self.before.first

    @property
    def falls(self) -> bool:
        """Whether there are clusters, and they meet."""
        meet = self.meet
        return meet.first >= CLUSTERS_THERE and meet.first - meet.last >= CLUSTERS_MEET

    @property
    def fails(self) -> bool:
        """Whether there is a sink, and it loses its mass."""
        sink = self.sink
        return sink.first >= SINK_THERE and sink.last <= (1 - SINK_FAILS) * sink.first

    @property
    def count(self) -> int:
        """How many of the three are seen."""
        return self.grows + self.falls + self.fails


def links(found: Measured) -> Links | None:
    """The links, ``None`` where something of them was not measured."""
    geometry, clusters = found.table("geometry"), found.table("clusters")
    scores, span = found.table("scores"), found.span()
    if geometry is None or clusters is None or scores is None or span is None:
        return None
    return Links(
        change(geometry, "stable_rank", span, side="key", stage="after"),
        change(geometry, "stable_rank", span, side="key", stage="before"),
        change(clusters, "silhouette", span, stage="after"),
        change(scores, "sink_mass", span, stage="after"),
    )


def chain(found: Measured) -> Finding:
    """Whether the chain is seen: rank grows, clusters meet, sink fails."""
    if found.table("geometry") is None:
        return missing(found, "geometry", "The geometry of queries and keys")
    known, span = links(found), found.span()
    if known is None or span is None:
        return no_span(found, "The chain of failure at length")
    name, clusters, sink = title(found.label), _cluster_words(known), _sink_words(known)
    listed = (
        f"{_where(found, span)} the stable rank of keys {_verb(known)} ({known.rank.words}; "
        f"before the encoding {known.before.words}), {clusters}, and {sink}"
    )
    if known.count == 3:
        said = "the chain by which the RoPE-ID paper explains failure at length, seen whole in"
    elif known.count:
        counted = ("none", "one", "two")[known.count]
        said = f"{counted} of the three links of the RoPE-ID paper's chain can be seen in"
    else:
        said = "nothing of the RoPE-ID paper's chain is seen in"
    text = f"{listed}: {said} {name}."
    most = [
        f"{what} in {one.where}"
        for what, one, seen in (
            ("rank", known.rank, known.grows),
            ("silhouette", known.meet, known.falls),
            ("sink", known.sink, known.fails),
        )
        if seen and one.where
    ]
    if most:
        text += f" Most: {'; '.join(most)}."
    return Finding("seen" if known.count else "not seen", text)


def _verb(known: Links) -> str:
    if known.grows:
        return "grows"
    factor = known.rank.last / known.rank.first
    if factor >= RANK_GROWS:
        return "grows, but no more than before the encoding"
    return "stays" if factor >= 1 / RANK_GROWS else "falls"


def _cluster_words(known: Links) -> str:
    if known.meet.first < CLUSTERS_THERE:
        return f"keys and queries are no clusters apart (silhouette {known.meet.words})"
    what = "meet" if known.falls else "do not meet"
    return f"the clusters of keys and queries {what} (silhouette {known.meet.words})"


def _sink_words(known: Links) -> str:
    if known.sink.first < SINK_THERE:
        return f"the first token is no sink (attention on it {known.sink.words})"
    what = "loses its mass" if known.fails else "keeps its mass"
    return f"the sink {what} ({known.sink.words})"


def _where(found: Measured, span: tuple[int, int]) -> str:
    if found.train_length and span[0] <= found.train_length:
        at = f"Beyond its training length of {found.train_length:,}"
        more = f" (measured from {span[0]:,}" if span[0] != found.train_length else " (measured"
        return f"{at}{more} to {span[1]:,} tokens)"
    if found.train_length:
        return f"From {span[0]:,} to {span[1]:,} tokens, all beyond its training length,"
    return f"From {span[0]:,} to {span[1]:,} tokens (its training length is not known)"
