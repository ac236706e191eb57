"""Tables to print and to write, and how their numbers are written."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table: the first column is text, the others are numbers.

    Attributes:
        title: What it shows.
        columns: Their heads.
        rows: Cells, as many as columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self, width: int) -> Table:
        """To be printed within a width; a few rows that are too wide for it stand upright."""
        cells = zip(self.columns, *self.rows, strict=True)
        needed = 1 + sum(3 + max(map(len, column)) for column in cells)
        if needed > width and len(self.rows) < len(self.columns):
            return self._upright().rich(needed)
        table = Table(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def _upright(self) -> Grid:
        columns, *rows = zip(self.columns, *self.rows, strict=True)
        return Grid(self.title, columns, tuple(rows))

    def markdown(self) -> str:
        """To be written."""
        marks = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [" | ".join(cells) for cells in (self.columns, marks, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *(f"| {line} |" for line in lines)])


def gigabytes(size: float) -> str:
    """Bytes as GB of 10^9, to three digits."""
    return _digits(size / 1e9)


def amount(number: float) -> str:
    """A number with a prefix of thousands."""
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= factor:
            return f"{_digits(number / factor)} {prefix}"
    for factor, prefix in ((1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{_digits(number / factor)} {prefix}"
    return _digits(number)


def hours(seconds: float | None) -> str:
    """Seconds as hours, to three digits; a dash for none."""
    return "-" if seconds is None else _digits(seconds / 3600)


def _digits(number: float) -> str:
    # Three digits, without an exponent.
    places = 0 if number >= 99.95 else 1 if number >= 9.995 else 2 if number >= 0.0995 else 3
    return f"{number:,.{places}f}"
