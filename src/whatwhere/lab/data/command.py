"""`whatwhere data` on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from whatwhere.lab.console import counting
from whatwhere.lab.data import shards
from whatwhere.lab.data.catalogue import CORPORA, make_corpus, origin
from whatwhere.lab.data.corpus import CorpusSplit
from whatwhere.lab.data.extras import need
from whatwhere.lab.data.prepare import prepare
from whatwhere.lab.errors import user_errors
from whatwhere.lab.storage import RunError, read_json


@dataclass(frozen=True)
class Prepare:
    """Turn a data set into shards of tokens.

    A preparation that was stopped goes on where it was.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """a data set (see `whatwhere data list`)"""
    output: Path
    """new folder for shards and manifest"""
    from_: Annotated[tuple[Path, ...], tyro.conf.arg(name="from", metavar="PATH ...")] = ()
    """raw files or folders; none looks below $WHATWHERE_DATA and in the cache, then fetches"""
    tokenizer: str | None = None
    """of text: bytes, or a transformers tokenizer by name or folder; none is the set's own"""
    workers: int | None = None
    """processes; none is as many as there are cores"""
    max_bytes: int | None = None
    """read this many bytes of text at most"""

    def run(self) -> None:
        """Prepare."""
        with user_errors():
            if self.workers is not None and self.workers < 1:
                raise ValueError(f"workers must be at least 1, got {self.workers}")
            corpus = make_corpus(
                self.name, self.from_, tokenizer=self.tokenizer, max_bytes=self.max_bytes
            )
            folder = prepare(corpus, self.output, self.workers)
        _say(f"{self.output}: {_counts(folder.manifest)}")


@dataclass(frozen=True)
class List:
    """List the data sets."""

    def run(self) -> None:
        """List."""
        table = Table(title="data sets", title_justify="left")
        for column in ("name", "what it is", "licence", "from"):
            table.add_column(column, overflow="fold")
        for name, what in CORPORA.items():
            table.add_row(name, what, *origin(name))
        Console().print(table)


@dataclass(frozen=True)
class Verify:
    """Compare every file of a prepared folder with its checksum."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """folder made by `whatwhere data prepare`"""

    def run(self) -> None:
        """Verify; exit code 1 if a file is missing or damaged."""
        with user_errors():
            manifest = shards.read_manifest(self.folder)
        total = shards.file_count(manifest)
        wrong = []
        with counting(f"verifying {self.folder}", total) as shown:
            for file, problem in shards.check_files(self.folder, manifest):
                if problem:
                    wrong.append(f"{file.name} is {problem}")
                shown.advance(f"{len(wrong)} damaged")
        if wrong:
            raise RunError(
                f"{len(wrong)} of {total} files of {self.folder} are not as they were made: "
                f"{'; '.join(wrong)}"
            )
        shards.mark_verified(self.folder, manifest)
        _say(f"{self.folder}: all {total} files are as they were made")


@dataclass(frozen=True)
class Show:
    """Show what a prepared folder holds, and a few of its documents."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """folder made by `whatwhere data prepare`"""
    split: CorpusSplit = "train"
    """whose documents to show"""
    documents: int = 3
    """how many, spaced evenly"""
    tokens: int = 64
    """of each, from its start"""

    def run(self) -> None:
        """Show."""
        with user_errors():
            for name in ("documents", "tokens"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
            folder = shards.PreparedFolder(self.folder)
            texts = self._texts(folder) if self.documents and self.tokens else []
        Console().print(_table(folder.manifest))
        for text in texts:
            _say(text)

    def _texts(self, folder: shards.PreparedFolder) -> list[str]:
        stream = folder.stream(self.split)
        bounds, decode = stream.bounds, decoder(folder)
        last, shown = len(bounds) - 2, min(self.documents, len(bounds) - 1)
        found = []
        for i in range(shown):
            number = i * last // max(1, shown - 1)
            size = int(bounds[number + 1] - bounds[number])
            ids = stream.take(bounds[number : number + 1], min(size, self.tokens))[0].tolist()
            more = " ..." if size > self.tokens else ""
            found.append(f"{self.split} document {number}, {size} tokens: {decode(ids)!r}{more}")
        return found


Action = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


@dataclass(frozen=True)
class Data:
    """Prepare data sets for training, and look at them."""

    action: Annotated[Action, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Do what is asked for."""
        self.action.run()


def decoder(folder: shards.PreparedFolder) -> Callable[[Sequence[int]], str]:
    """A function that makes text of ids; of numbers, where the ids stand for no text."""
    if folder.manifest.tokenizer.name == "bytes":
        return lambda ids: bytes(ids).decode(errors="replace")
    file = folder.path / shards.TOKENIZER / "tokenizer.json"
    # Another library's file of this name, such as MidiTok's, has no model.
    if not file.exists() or "model" not in read_json(file):
        return lambda ids: " ".join(map(str, ids))
    loaded = need("tokenizers", "data").Tokenizer.from_file(str(file))
    return lambda ids: str(loaded.decode(list(ids), skip_special_tokens=False))


def _counts(manifest: shards.Manifest) -> str:
    parts = [
        f"{name} {split.documents} documents, {split.tokens} tokens"
        for name, split in manifest.splits.items()
    ]
    parts += [f"left out: {count} {reason}" for reason, count in manifest.left_out.items()]
    return "; ".join(parts)


def _table(manifest: shards.Manifest) -> Table:
    table = Table(
        title=f"{manifest.name} from {manifest.source}; licence: {manifest.licence}; tokens: "
        f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size} ids",
        title_justify="left",
    )
    table.add_column("split")
    for column in ("documents", "tokens", "tokens/document", "shards"):
        table.add_column(column, justify="right")
    for name, split in manifest.splits.items():
        mean = split.tokens / max(1, split.documents)
        counts = (split.documents, split.tokens, f"{mean:.0f}", len(split.shards))
        table.add_row(name, *map(str, counts))
    return table


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True, markup=False)
