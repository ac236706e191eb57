"""Any causal language model of transformers, with an encoding of ours, by one call."""

from whatwhere.models.conversion.convert import convert, convertible
from whatwhere.models.conversion.native import from_transformers, to_transformers
from whatwhere.models.conversion.structure import Convertibility, NotConvertibleError

__all__ = [
    "Convertibility",
    "NotConvertibleError",
    "convert",
    "convertible",
    "from_transformers",
    "to_transformers",
]
