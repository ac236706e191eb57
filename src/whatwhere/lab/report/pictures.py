"""What pages are made of: figures within them, and the templates."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from whatwhere.figures.style import svg
from whatwhere.lab.report.canvas import save


@dataclass(frozen=True)
class Picture:
    """A figure within a page.

    Attributes:
        name: Stem of its files.
        caption: What it shows.
        alt: What it shows, for those who cannot see it.
        wide: Data URI of the figure for a page.
        narrow: Data URI of the figure for a telephone.
        tables: Stems of CSV files that hold its numbers.
    """

    name: str
    caption: str
    alt: str
    wide: str
    narrow: str
    tables: tuple[str, ...] = ()


def picture(
    draw: Callable[[bool], Figure],
    folder: Path,
    name: str,
    caption: str,
    alt: str = "",
    tables: tuple[str, ...] = (),
) -> Picture | None:
    """Draw a figure, write its files, and make it part of a page.

    Args:
        draw: Draws it, narrow or wide.
        folder: Where its files go.
        name: Stem of its files.
        caption: What it shows.
        alt: The same for those who cannot see it; the caption by default.
        tables: Stems of CSV files beside it.

    Returns:
        `None` if there is nothing to draw (a `ValueError` of `draw`), which the page says
        elsewhere.

    Raises:
        DiskFullError: If there is no space left.
    """
    try:
        wide, narrow = draw(False), draw(True)
    except ValueError:
        return None
    _, vector = save(wide, folder / name)
    content = vector.read_text(encoding="utf-8")
    return Picture(name, caption, alt or caption, _uri(content), _uri(svg(narrow)), tables)


def environment(*packages: str) -> Environment:
    """Templates of some packages, then those that pages share."""
    places = [PackageLoader(package, "templates") for package in packages]
    return Environment(
        loader=ChoiceLoader([*places, PackageLoader("whatwhere.lab.report", "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def counted(number: int, name: str) -> str:
    """As in `2 heads`."""
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def _uri(vector: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(vector.encode()).decode()
