"""Every position encoding, by class and by name.

To add one: a file here with a subclass of `Encoding`, and one line in `ENCODINGS`. The law tests
pick it up by themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from whatwhere.encodings.absolute import Learned, Sinusoidal
from whatwhere.encodings.alibi import ALiBi
from whatwhere.encodings.base import Encoding
from whatwhere.encodings.pope import PoPE, PoPEID
from whatwhere.encodings.rope import NoPE, RoPE
from whatwhere.encodings.rope_id import RoPEID
from whatwhere.encodings.yarn import YaRN

ENCODINGS: dict[str, Callable[..., Encoding]] = {
    "pope": PoPE,
    "pope-id": PoPEID,
    "rope": RoPE,
    "rope-high": partial(RoPEID, fraction=1.0, temperature=False),
    "rope-id": RoPEID,
    "yarn": YaRN,
    "nope": NoPE,
    "alibi": ALiBi,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
}

_COMMON = ("head_dim", "num_heads", "train_length")


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options that an encoding takes besides ``head_dim``, ``num_heads``, ``train_length``.

    Raises:
        ValueError: If there is no encoding of this name.
    """
    if not isinstance(name, str) or name not in ENCODINGS:
        close = get_close_matches(str(name), ENCODINGS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown encoding {name!r}{hint}: expected one of {', '.join(ENCODINGS)}"
        )
    parameters = inspect.signature(ENCODINGS[name]).parameters
    return {key: value for key, value in parameters.items() if key not in _COMMON}


def make(
    name: str,
    *,
    head_dim: int,
    num_heads: int,
    train_length: int | None = None,
    **given: Any,
) -> Encoding:
    """Make an encoding by its name in `ENCODINGS`.

    Args:
        name: ``"pope"``, ``"rope"``, ...
        head_dim: ``D``, channels of a head.
        num_heads: ``H``, query heads.
        train_length: Length of training sequences in tokens. Encodings whose definition needs it
            (``rope-id``, ``rope-high``, ``pope-id``, ``yarn``, ``learned``) take it, for the
            others it is no part of the score.
        **given: Options of the encoding; see its class.

    Raises:
        ValueError: If the name or an option is unknown (the message lists the valid ones), or a
            needed one is missing or out of range.
    """
    valid = options(name)
    unknown = [key for key in given if key not in valid]
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))} for encoding {name!r}: "
            f"expected some of {', '.join(valid)}"
        )
    required = [
        key
        for key, parameter in valid.items()
        if parameter.default is inspect.Parameter.empty and key not in given
    ]
    if required:
        raise ValueError(f"encoding {name!r} needs {', '.join(required)}")
    length = inspect.signature(ENCODINGS[name]).parameters.get("train_length")
    if length is not None:
        if train_length is None and length.default is inspect.Parameter.empty:
            raise ValueError(
                f"encoding {name!r} needs train_length, the training length in tokens"
            )
        given["train_length"] = train_length
    return ENCODINGS[name](head_dim, num_heads, **given)


__all__ = [
    "ENCODINGS",
    "ALiBi",
    "Encoding",
    "Learned",
    "NoPE",
    "PoPE",
    "PoPEID",
    "RoPE",
    "RoPEID",
    "Sinusoidal",
    "YaRN",
    "make",
    "options",
]
