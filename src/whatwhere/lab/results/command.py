"""`whatwhere results`: keep the results of comparisons, and write the tables made from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
from rich.console import Console
from rich.table import Table

from whatwhere.lab.errors import user_errors
from whatwhere.lab.results import store


@dataclass(frozen=True)
class Results:
    """Keep results in one CSV and write the tables of Markdown files from it.

    With folders of comparisons their figures are added: a figure measured again takes the place
    of the old one. Only recipes of the package as they are shipped are kept.
    """

    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER")
    ] = ()
    """folders of comparisons to add; none only writes tables"""
    file: Path = store.DEFAULT
    """the CSV"""
    tables: tuple[Path, ...] = ()
    """Markdown files whose tables are written again"""

    def run(self) -> None:
        """Add, write, and say what there is."""
        from whatwhere.lab.results import markdown

        with user_errors():
            if self.folders:
                new, old = store.add(self.file, self.folders)
                print(f"{self.file}: {new} figures added, {old} replaced")
            table = store.load(self.file)
            for path in self.tables:
                changed = markdown.fill(path, table)
                print(f"{path}: {'written' if changed else 'as it was'}")
        if not self.folders and not self.tables:
            Console().print(_overview(table))


def _overview(table: pd.DataFrame) -> Table:

    shown = Table(title="results that are kept", title_justify="left")
    for name in ("recipe", "preset", "encodings", "seeds", "figures"):
        shown.add_column(name)
    for (recipe, preset), part in table.groupby(["recipe", "preset"], sort=False):
        encodings = ", ".join(dict.fromkeys(part["encoding"]))
        seeds = ", ".join(map(str, sorted(set(part["seed"]))))
        shown.add_row(str(recipe), str(preset), encodings, seeds, str(len(part)))
    return shown
