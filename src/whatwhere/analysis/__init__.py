"""A model looked at: which angles it meets, what its positions cost, what it retrieves."""

from whatwhere.analysis.cost import cost
from whatwhere.analysis.in_distribution import SafeLength, in_distribution, safe_length
from whatwhere.analysis.retrieval import (
    Item,
    copy_chance,
    copy_items,
    retrieval,
    without_copy,
)

__all__ = [
    "Item",
    "SafeLength",
    "copy_chance",
    "copy_items",
    "cost",
    "in_distribution",
    "retrieval",
    "safe_length",
    "without_copy",
]
