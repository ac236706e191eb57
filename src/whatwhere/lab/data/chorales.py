"""Bach's chorales: four voices on a grid of sixteenth notes, one token a voice and step.

The data of Boulanger-Lewandowski, Bengio & Vincent (2012) at sixteenth notes, in two files of
https://github.com/czhuang/JSB-Chorales-dataset: `jsb-chorales-16th.json`, whose steps hold the
pitches that sound (none to four), and `Jsb16thSeparated.json`, whose steps hold all four voices,
-1 where one is silent. Both have the same 229 / 76 / 77 pieces with the same notes, soprano
first; training and validation pieces come in another order.

"PoPE" (arXiv 2509.10534) says: serialised down the voices, then right in time; silence is -1;
90 tokens (pitches, silence, padding); length 2048; file `jsb-chorales-16th.json`. What it leaves
open is decided so:

- The file named has no -1. A step of fewer than four notes gets them at its end, as if the lowest
  voices were silent. The separated file, which tells the voices apart, says otherwise of 44 of
  92,536 steps; it is read when it is named, or where the folder has no other.
- 90 = 88 pitches (21 to 108, the range the data's makers give; 36 to 81 occur) + 2. Padding is 0,
  silence 1, pitch `p` is `p - 19`.
- There is no token for beginning or end: of a piece of `N` tokens, `N - 1` are predicted.
- 6 pieces (1 / 3 / 2) are longer than 2048 tokens, the longest 2560. They are not cut off here;
  what reads the documents cuts them into rows, and the first token of each row is not predicted:
  of these pieces `N - 2` are.

The paper's test figure (RoPE 0.5081, PoPE 0.4889) is taken as nats per token, the mean over all
tokens of the split, silence included; its unit is not given. For scale, on the test split: the
unigram has 3.40 nats a token, the pitch given the same voice's last one 1.00, so a model at half
of that is plausible, and one at 0.5081 a step, 0.13 a token, is not
(`tests/lab/data/test_data_chorales.py` counts them).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whatwhere.lab.data.corpus import Corpus, CorpusSplit, Item, TokenDocument
from whatwhere.lab.data.found_files import content_digest, file_digest

VOICES = 4
REST = -1
LOWEST, HIGHEST = 21, 108
PADDING, SILENCE, FIRST_PITCH = 0, 1, 2
VOCAB_SIZE = FIRST_PITCH + HIGHEST - LOWEST + 1

FILES = ("jsb-chorales-16th.json", "Jsb16thSeparated.json")
"""The published files by name, the paper's first."""
PIECES: dict[CorpusSplit, int] = {"train": 229, "validation": 76, "test": 77}
"""What the published files hold."""

_FORMAT = 1  # to be raised when the tokens of a file change
_KEYS: dict[CorpusSplit, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("valid", "validation"),
    "test": ("test",),
}

Steps = NDArray[np.int16]
"""`(steps, 4)` pitches, soprano to bass, -1 for silence."""


def encode(steps: Steps) -> NDArray[np.uint8]:
    """Return the `(4 * steps,)` tokens of `(steps, 4)` pitches: down the voices, then in time.

    Raises:
        ValueError: Another shape, or a number that is no pitch (21 to 108) and not -1.
    """
    if steps.ndim != 2 or steps.shape[1] != VOICES:
        raise ValueError(f"steps must have shape (steps, {VOICES}), got {steps.shape}")
    sounding = steps != REST
    if (sounding & ((steps < LOWEST) | (steps > HIGHEST))).any():
        raise ValueError(f"steps must hold pitches in {LOWEST} .. {HIGHEST} or {REST}")
    tokens = np.where(sounding, steps - LOWEST + FIRST_PITCH, SILENCE)
    return tokens.astype(np.uint8).reshape(-1)


def decode(tokens: NDArray[np.integer]) -> Steps:
    """Return the `(steps, 4)` pitches of tokens; padding at the end is left out.

    Raises:
        ValueError: Tokens that are no whole steps, padding elsewhere, or an unknown id.
    """
    ids = np.trim_zeros(np.asarray(tokens, dtype=np.int64), "b")
    if ids.size % VOICES:
        raise ValueError(f"tokens must be whole steps of {VOICES}, got {ids.size} tokens")
    if ((ids <= PADDING) | (ids >= VOCAB_SIZE)).any():
        raise ValueError(f"tokens must be in {SILENCE} .. {VOCAB_SIZE - 1}, then padding")
    pitches = np.where(ids == SILENCE, REST, ids - FIRST_PITCH + LOWEST)
    return pitches.astype(np.int16).reshape(-1, VOICES)


class ChoralesCorpus(Corpus):
    """The chorales, or any file in one of their two layouts, split as the file says.

    Args:
        paths: One JSON file, or a folder with one of `FILES` or a single other JSON file.
        name: Of the data set.

    Raises:
        ValueError: No file, or several, to read.
    """

    licence = "none stated by the data's makers; the music is in the public domain"
    homepage = "https://github.com/czhuang/JSB-Chorales-dataset"
    layout = "pieces"
    tokenizer_name = "four voices of 16th notes, 88 pitches"
    vocab_size = VOCAB_SIZE
    separator = None
    padding = PADDING

    def __init__(self, paths: Sequence[Path], name: str = "jsb") -> None:
        if len(paths) != 1:
            raise ValueError(f"paths: {name} is one JSON file or its folder, got {len(paths)}")
        self.name = name
        self.file = _find(paths[0])

    def items(self) -> Iterator[Item]:
        """Yield one item a split. See `Corpus.items`."""
        return (Item(split) for split in self._pieces)

    def documents(self, item: Item) -> Iterator[TokenDocument]:
        """Yield the pieces of a split, those without a step left out. See `Corpus.documents`."""
        split = next(split for split in PIECES if split == item.key)
        for index, steps in enumerate(self._pieces[split]):
            if len(steps):
                yield TokenDocument(split, encode(steps), f"{split}/{index}")
            else:
                self.leave_out("piece without a step")

    def describe(self) -> dict[str, Any]:
        """Return the file, its digest, counts and choices."""
        return {
            "source": str(self.file),
            "sha256": self._digest,
            "pieces": {split: len(pieces) for split, pieces in self._pieces.items()},
            "tokenizer": self.tokenizer_name,
            "choices": {
                "order": "down the voices, then right in time",
                "steps of fewer than four notes": "-1 at their end",
                "ids": f"padding {PADDING}, silence {SILENCE}, pitch p is p - 19",
                "begin and end": "no token",
            },
        }

    def fingerprint(self) -> str:
        """Return a digest of the file and the format. See `Corpus.fingerprint`."""
        return content_digest({"format": _FORMAT, "corpus": "chorales", "file": self._digest})

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The ids of pitches."""
        return {"pitch": (FIRST_PITCH, VOCAB_SIZE - 1)}

    @cached_property
    def _digest(self) -> str:
        return file_digest(self.file)

    @cached_property
    def _pieces(self) -> dict[CorpusSplit, list[Steps]]:
        return read_chorales(self.file)


def read_chorales(file: Path) -> dict[CorpusSplit, list[Steps]]:
    """Return the pieces of a file by split.

    Args:
        file: JSON `{"train": pieces, "valid": pieces, "test": pieces}`, a piece a list of steps,
            a step a list of at most four numbers: pitches (21 to 108), -1 for silence.

    Raises:
        ValueError: The file is damaged, has another layout, or has the name of a published file
            and not its 229 / 76 / 77 pieces.
    """
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is no JSON, or cut short ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: {_LAYOUT}, got a {type(content).__name__}")
    pieces = {split: _split(file, content, keys) for split, keys in _KEYS.items()}
    counts = {split: len(found) for split, found in pieces.items()}
    if file.name in FILES and counts != PIECES:
        expected, got = (" / ".join(map(str, c.values())) for c in (PIECES, counts))
        raise ValueError(
            f"{file}: {file.name} has {expected} pieces (train / validation / test), this one "
            f"{got}; a file of your own needs a name of its own"
        )
    return pieces


_LAYOUT = "an object of lists 'train', 'valid' and 'test' is needed"


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such file or folder")
    published = [path / name for name in FILES if (path / name).is_file()]
    files = published[:1] or sorted(path.glob("*.json"))
    if len(files) != 1:
        raise ValueError(
            f"{path}: holds no {FILES[0]}, and {len(files)} other JSON files; name one"
        )
    return files[0]


def _split(file: Path, content: dict[str, Any], keys: Sequence[str]) -> list[Steps]:
    key = next((key for key in keys if key in content), None)
    if key is None:
        raise ValueError(f"{file}: {_LAYOUT}, {keys[0]!r} is missing")
    pieces = content[key]
    if not isinstance(pieces, list) or not pieces:
        raise ValueError(f"{file}: {key!r} must be a list of pieces, not empty")
    return [_piece(f"{file}: {key}[{index}]", piece) for index, piece in enumerate(pieces)]


def _piece(place: str, piece: Any) -> Steps:
    if not isinstance(piece, list):
        raise ValueError(f"{place}: a piece is a list of steps, got {piece!r:.40}")
    steps = np.full((len(piece), VOICES), REST, dtype=np.int16)
    for row, step in enumerate(piece):
        if not isinstance(step, list) or len(step) > VOICES:
            raise ValueError(
                f"{place}[{row}]: a step is a list of at most {VOICES} notes, got {step!r:.40}"
            )
        for voice, note in enumerate(step):
            # The published file has whole numbers as 60 and as 60.0.
            if not isinstance(note, int | float) or (note != REST and note not in _PITCHES):
                raise ValueError(
                    f"{place}[{row}][{voice}]: a note is a pitch in {LOWEST} .. {HIGHEST}, or "
                    f"{REST} for silence, got {note!r:.40}"
                )
            steps[row, voice] = note
    return steps


_PITCHES = frozenset(range(LOWEST, HIGHEST + 1))
