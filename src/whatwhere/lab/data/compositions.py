"""Which files are the same piece of music, and splits that keep a piece together.

Titles in MAESTRO's metadata are free text: one étude is "Etude Op. 10 No. 8" here and "Etude in F
Major, Op. 10, No. 8" there. So pieces are linked by whatever two titles of a composer share: the
whole title, a catalogue number, form and number ("Ballade No. 2") or form and key ("Sonata in G
Major"). That links some pieces that are not the same, all études of opus 10 among them, which
costs nothing; to miss a link would put a piece into training and test.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from whatwhere.lab.data.corpus import CorpusSplit

HELD_OUT = 0.05
"""Share of the files in validation, and in test."""

_CATALOGUE = re.compile(
    r"\b(op(?:us)?|bwv|woo|hwv|hob|kv?|d|s|l|r)[\s.:]*(\d+|[ivxl]+\s*[:/]\s*\d+)"
)
_NUMBER = re.compile(r"\d+")
_KEY = re.compile(r"\bin ([a-g])[\s-]*(sharp|flat|#|)[\s-]*(major|minor|)(?!\w)")
_PART = re.compile(
    r"(?:^|[\s_.-]+)(?:cut|part|pt|mvt|movement)(?:_no)?[\s_.-]*\d*$", re.IGNORECASE
)


def title_keys(composer: str, title: str) -> set[str]:
    """Return what a title has in common with other titles of the same piece."""
    who, text = _plain(composer), _plain(title)
    keys = {f"title {text}"}
    first_number = len(text)
    for match in _CATALOGUE.finditer(text):
        first_number = min(first_number, match.start())
        catalogue = {"opus": "op", "kv": "k"}.get(match[1], match[1])
        keys.add(f"{catalogue} {''.join(match[2].split())}")
    word = re.search(r"[a-z]+", text)
    form = word[0].rstrip("s") if word else ""
    # Before the catalogue number it counts pieces of a form, after it those of one opus.
    if number := _NUMBER.search(text, 0, first_number):
        keys.add(f"{form} {number[0]}")
    if key := _KEY.search(text):
        accidental = {"#": "sharp"}.get(key[2], key[2])
        keys.add(f"{form} in {key[1]} {accidental} {key[3] or 'major'}")
    return {f"{who}: {key}" for key in keys}


def whole_name(name: str) -> str:
    """Return a path without suffix and the number of a part: "a/x" of "a/x_cut_no_2.mid"."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + _PART.sub("", file.rpartition(".")[0] or file)


def group(keys: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return names in groups: those that share a key, directly or through others.

    Args:
        keys: Of each name, not empty.

    Returns:
        Each name once; groups in an order, and names within, that follow from the keys and
        names alone.
    """
    # Disjoint sets over the keys; the root of each is its smallest key.
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for own in keys.values():
        roots = {root(key) for key in own}
        for other in roots:
            parents[other] = min(roots)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, own in sorted(keys.items()):
        groups[root(next(iter(own)))].append(name)
    return [names for _, names in sorted(groups.items(), key=lambda entry: _digest(entry[0]))]


def split_by_piece(keys: Mapping[str, Iterable[str]]) -> dict[str, CorpusSplit]:
    """Return the split of each name: 90 / 5 / 5 % of the names, groups of `group` whole.

    Groups are taken in the order of a hash while they fit into the 5 %, for validation, then for
    test; where none fits, the smallest is. Three groups or more give all splits, two give
    training and validation.
    """
    left = group(keys)
    quota = max(1, round(HELD_OUT * len(keys)))
    splits: dict[str, CorpusSplit] = dict.fromkeys(keys, "train")
    held_out: tuple[tuple[CorpusSplit, int], ...] = (("validation", 2), ("test", 1))
    for split, kept in held_out:
        spare = len(left) - min(kept, max(1, len(left) - 1))
        chosen: list[int] = []
        count = 0
        for index, names in enumerate(left):
            if len(chosen) < spare and count + len(names) <= quota:
                chosen.append(index)
                count += len(names)
        if spare > 0 and not chosen:
            chosen = [min(range(len(left)), key=lambda index: len(left[index]))]
        splits |= {name: split for index in chosen for name in left[index]}
        taken = set(chosen)
        left = [names for index, names in enumerate(left) if index not in taken]
    return splits


def _plain(text: str) -> str:
    # Without accents, case and repeated blanks.
    decomposed = unicodedata.normalize("NFKD", text)
    letters = "".join(char for char in decomposed if not unicodedata.combining(char))
    return " ".join(letters.casefold().split())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
