"""Every data set by name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from whatwhere.lab.data import raw
from whatwhere.lab.data.corpus import Corpus, CorpusSplit
from whatwhere.lab.data.documents import VALIDATION_FRACTION
from whatwhere.lab.data.hub import HUB, HubTexts
from whatwhere.lab.data.textfiles import TextFiles

CORPORA: dict[str, str] = {
    "jsb": "Bach's chorales, four voices in sixteenth notes",
    "maestro": "MAESTRO v3: piano performances as MIDI, REMI tokens",
    "midi": "MIDI files of your own, REMI tokens",
    "genome": "the human reference genome, 6-mer tokens",
    "fasta": "FASTA files of your own, 6-mer tokens",
    "text": "text files of your own, any tokenizer",
    "openwebtext": "OpenWebText",
    "pg19": "PG-19: books published before 1919",
    "fineweb": "FineWeb, its sample of 10 billion tokens",
    "fineweb-edu": "FineWeb-Edu, its sample of 10 billion tokens",
    "dolma": "Dolma 1.7",
}
"""Name -> what it is. A new data set is a `Corpus` in a file of its own, and a line here."""

# Imported when they are asked for, as they need packages of their own.
_MODULES = {
    "jsb": ("chorales", "ChoralesCorpus"),
    "maestro": ("music", "MidiCorpus"),
    "midi": ("music", "MidiCorpus"),
    "genome": ("genome", "GenomeCorpus"),
    "fasta": ("genome", "GenomeCorpus"),
}


def make_corpus(
    name: str,
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: str | None = None,
    max_bytes: int | None = None,
    only: CorpusSplit | None = None,
    cache_dir: Path | None = None,
) -> Corpus:
    """Return a data set by name.

    Args:
        name: In `CORPORA`.
        paths: Its raw files and folders. By default they are looked for below `$WHATWHERE_DATA`
            and in the cache, and fetched if they are in neither.
        tokenizer: Of text: `"bytes"`, or one of `transformers` by name or folder; `None` is the
            data set's own.
        max_bytes: Of text: read this much at most.
        only: Of a set with splits of its own (`has_own`): the one to prepare.
        cache_dir: `default_cache_dir()` by default.

    Raises:
        ValueError: There is no such data set, its files are not here and cannot be fetched, a
            package that it needs is missing, or an option is not for it; one line.
        RunError: The disk is full.
    """
    check_name(name)
    if only is not None and not has_own(name, only):
        raise ValueError(f"only: {name} has no {only} split of its own")
    if name == "text":
        texts = [str(path) for path in paths] or _own_texts(cache_dir)
        return TextFiles(texts, name, tokenizer or "bytes", max_bytes=max_bytes)
    if name in HUB:
        return _hub_texts(name, paths, tokenizer, max_bytes, only, cache_dir)
    for option, given in (("tokenizer", tokenizer), ("max_bytes", max_bytes)):
        if given is not None:
            raise ValueError(f"{option}: {name} takes none, it is for text; got {given!r}")
    found = raw.find(name, paths, cache_dir)
    module, kind = _MODULES[name]
    corpus: Corpus = getattr(import_module(f"whatwhere.lab.data.{module}"), kind)(found, name)
    return corpus


def check_name(name: str) -> None:
    """Raise a `ValueError` if there is no data set of this name."""
    if name not in CORPORA:
        close = get_close_matches(name, CORPORA, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown data set {name!r}{hint}: expected one of {', '.join(CORPORA)}")


def takes_tokenizer(name: str) -> bool:
    """Whether a data set is text, which any tokenizer reads; others have one of their own."""
    return name not in _MODULES


def has_own(name: str, split: CorpusSplit) -> bool:
    """Whether the makers of a data set have split it, and have such a split."""
    return name in HUB and {"validation", split} <= HUB[name].splits.keys()


def origin(name: str) -> tuple[str, str]:
    """The licence of a data set, and where it comes from."""
    if name in HUB:
        return HUB[name].licence, HUB[name].homepage
    found = raw.RAW[name]
    return found.licence, found.url or found.what


def _own_texts(cache_dir: Path | None) -> list[str]:
    # Books lie beside their licence, which is no book.
    (place,) = raw.find("text", (), cache_dir)
    return [str(place / "**" / "*.txt")]


def _hub_texts(
    name: str,
    paths: Sequence[str | Path],
    tokenizer: str | None,
    max_bytes: int | None,
    only: CorpusSplit | None,
    cache_dir: Path | None,
) -> Corpus:
    found = HUB[name]
    local = [str(path) for path in paths] or _brought(name, cache_dir)
    if not local:
        return HubTexts(name, tokenizer, max_bytes=max_bytes, only=only, cache_dir=cache_dir)
    return TextFiles(
        local,
        name,
        tokenizer or found.tokenizer,
        validation_fraction=found.validation_fraction or VALIDATION_FRACTION,
        max_bytes=max_bytes,
        own_splits=has_own(name, "validation"),
        only=only,
        licence=found.licence,
        homepage=found.homepage,
    )


def _brought(name: str, cache_dir: Path | None) -> list[str]:
    # Files that the user has put where we would look for them.
    place = raw.below_data(name) or raw.below(raw.cached(name, cache_dir))
    return [str(place)] if place else []
