"""Figures of what `whatwhere.analysis` measures; importing this package imports matplotlib.

Each takes a data frame, or several by the labels of their models, and returns a figure of
matplotlib: models have one scale. `narrow` draws it for a telephone. `whatwhere.figures.style`
turns a figure into the bytes of a file.
"""

from whatwhere.analysis.plots.frequencies import frequency_usage, learned_delta
from whatwhere.analysis.plots.heads import by_head, what_where
from whatwhere.analysis.plots.lines import cost, geometry
from whatwhere.analysis.plots.maps import in_distribution, retrieval
from whatwhere.analysis.plots.scatter import points

__all__ = [
    "by_head",
    "cost",
    "frequency_usage",
    "geometry",
    "in_distribution",
    "learned_delta",
    "points",
    "retrieval",
    "what_where",
]
