"""One colour, marker and line for each encoding, the same in every figure and table.

The colours are those of Okabe and Ito, which people with any form of colour blindness tell apart,
but for its yellow, too pale on white; markers and dashes tell the rest apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How an encoding is drawn.

    Attributes:
        title: Its name as the papers write it.
        colour: `#rrggbb`.
        marker: A marker of matplotlib.
        dashes: A line style of matplotlib.
    """

    title: str
    colour: str
    marker: str
    dashes: str = "-"

    @property
    def ink(self) -> str:
        """The colour, darkened until it is legible as text on white."""
        parts = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return "#" + "".join(f"{round(0.67 * part):02x}" for part in parts)


KNOWN = {
    "pope": Style("PoPE", "#0072b2", "o"),
    "rope": Style("RoPE", "#d55e00", "^"),
    "rope-id": Style("RoPE-ID", "#009e73", "s"),
    "yarn": Style("YaRN", "#e69f00", "D"),
    "pope-id": Style("PoPE-ID", "#56b4e9", "p"),
    "rope-high": Style("RoPE-high", "#cc79a7", "v"),
    "nope": Style("NoPE", "#222222", "X"),
    "alibi": Style("ALiBi", "#8a7d00", "P"),
    "learned": Style("learned", "#7f7f7f", "h", "--"),
    "sinusoidal": Style("sinusoidal", "#882255", "<", "--"),
}
"""Styles of the names in `whatwhere.ENCODINGS`."""

SPARE = (
    ("#44aa99", "d"),
    ("#aa4499", ">"),
    ("#6b7a2f", "*"),
    ("#6699cc", "H"),
    ("#661100", "8"),
    ("#999999", "o"),
)
"""Colours and markers of labels that a recipe makes up, in the order in which they come."""


def title(label: str) -> str:
    """The name of a label as the papers write it.

    >>> title("pope"), title("rope-half"), title("partial-rope-10"), title("nope-qk-norm")
    ('PoPE', 'RoPE-half', 'partial RoPE 10 %', 'NoPE + QK-Norm')
    """
    if label in KNOWN:
        return KNOWN[label].title
    if label.endswith("-qk-norm"):
        return f"{title(label.removesuffix('-qk-norm'))} + QK-Norm"
    name, dash, rest = label.partition("-")
    known, _, share = rest.rpartition("-")
    if name == "partial" and known in KNOWN and share.isdecimal():
        return f"partial {KNOWN[known].title} {share} %"
    return KNOWN[name].title + dash + rest if name in KNOWN else label


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label; those of known names never change."""
    chosen: dict[str, Style] = {}
    spare = 0
    for label in dict.fromkeys(labels):
        if label in KNOWN:
            chosen[label] = KNOWN[label]
            continue
        colour, marker = SPARE[spare % len(SPARE)]
        dashes = ("--", "-.", ":")[spare // len(SPARE) % 3]
        chosen[label] = Style(title(label), colour, marker, dashes)
        spare += 1
    return chosen
