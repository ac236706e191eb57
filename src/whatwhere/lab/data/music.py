"""Piano performances in MIDI as REMI tokens: MAESTRO v3, or any folder of MIDI files.

REMI (Huang & Yang 2020, arXiv 2002.00212) through MidiTok (https://github.com/Natooz/MidiTok):
bars, positions in the bar, then pitch, velocity and duration of each note. "PoPE" (arXiv
2509.10534) says of MAESTRO: REMI with PAD, BOS, EOS and MASK, a vocabulary of 328, length 2048,
transposition by -3 to +3 semitones, 90 / 5 / 5 %. What it leaves open is decided so:

- 328 is what the settings of MidiTok's own first example give, with chords and tempos, in its
  version 3.0.4; since 3.0.6 they need the pitch ranges of `remi` to give the same tokens, and no
  time signatures. That the paper used these is inferred from the number alone.
- The split is by piece and random; `compositions` says what a piece is. MAESTRO's own split
  (75 / 11 / 14 % of its performances) is not used. With `maestro-v3.0.0.csv` or `.json` among the
  files, composer and title tell the pieces; without, files are of one piece that differ in the
  number of a part (`_cut_no_1`) or hold the same notes.
- A document is BOS, the tokens of a file, EOS; a file of several tracks gives one each. Longer
  ones are cut into rows by what reads them, not here. Pedals are left out, as in those settings.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whatwhere.lab.data.compositions import group, split_by_piece, title_keys, whole_name
from whatwhere.lab.data.corpus import Corpus, CorpusSplit, Item, TokenDocument
from whatwhere.lab.data.extras import need
from whatwhere.lab.data.found_files import content_digest, file_digest, find_files

PAD, BOS, EOS, MASK = range(4)
VOCAB_SIZE = 328
LOWEST, HIGHEST = 21, 108
FIRST_PITCH, LAST_PITCH = 5, 92

_FORMAT = 1  # to be raised when the tokens or the split of a file change
_SUFFIXES = (".mid", ".midi")
_HEADER = 14  # bytes of a MIDI file before its tracks


@cache
def remi() -> Any:
    """Return the `miditok.REMI` tokenizer of 328 tokens, ids 0 to 3 PAD, BOS, EOS and MASK.

    Raises:
        ValueError: MidiTok is not installed, or is of a version that makes other tokens.
    """
    miditok = need("miditok", "data")
    tokenizer = miditok.REMI(
        miditok.TokenizerConfig(
            pitch_range=(LOWEST, HIGHEST),
            drums_pitch_range=(27, 87),
            beat_res={(0, 4): 8, (4, 12): 4},
            num_velocities=32,
            special_tokens=["PAD", "BOS", "EOS", "MASK"],
            use_chords=True,
            use_rests=False,
            use_tempos=True,
            use_time_signatures=False,
            use_programs=False,
            num_tempos=32,
            tempo_range=(40, 250),
        )
    )
    vocabulary: dict[str, int] = tokenizer.vocab
    expected = {"PAD_None": PAD, "BOS_None": BOS, "EOS_None": EOS, "MASK_None": MASK}
    expected |= {f"Pitch_{LOWEST + step}": FIRST_PITCH + step for step in range(88)}
    if len(vocabulary) != VOCAB_SIZE or not expected.items() <= vocabulary.items():
        raise ValueError(
            f"miditok {version('miditok')} makes other tokens ({len(vocabulary)}) than the "
            f"{VOCAB_SIZE} needed: pip install 'whatwhere[data]'"
        )
    return tokenizer


def transpose(tokens: NDArray[np.unsignedinteger], shift: int) -> NDArray[np.unsignedinteger]:
    """Return tokens with every pitch `shift` semitones higher, all else (drums too) as it was.

    Raises:
        ValueError: A pitch would leave 21 to 108.
    """
    ids = tokens.astype(np.int64)
    pitched = (ids >= FIRST_PITCH) & (ids <= LAST_PITCH)
    moved = ids[pitched] + shift
    if ((moved < FIRST_PITCH) | (moved > LAST_PITCH)).any():
        raise ValueError(f"shift={shift} moves a pitch out of {LOWEST} .. {HIGHEST}")
    ids[pitched] = moved
    return ids.astype(tokens.dtype)


def encode(score: Any) -> list[NDArray[np.uint16]]:
    """Return `(N,)` tokens of each track of a `symusic.Score` that has a note, BOS and EOS around.

    Notes outside 21 to 108 (drums: 27 to 87) are left out.
    """
    vocabulary: dict[str, int] = remi().vocab
    pitches = {token for name, token in vocabulary.items() if name.startswith("Pitch")}
    # MidiTok gives a piece whose notes are all out of range its tempo alone.
    return [
        np.array([BOS, *sequence.ids, EOS], dtype=np.uint16)
        for sequence in remi().encode(score)
        if not pitches.isdisjoint(sequence.ids)
    ]


def decode(tokens: NDArray[np.unsignedinteger]) -> Any:
    """Return the `symusic.Score` of `(N,)` tokens of one track; special tokens say nothing."""
    return remi().decode([[token for token in tokens.tolist() if token > MASK]])


class _File(NamedTuple):
    """What is known of a file once all are read."""

    path: Path
    split: CorpusSplit
    notes: int
    outside: int


class MidiCorpus(Corpus):
    """MIDI files, split by piece.

    Args:
        paths: Files, and folders of which every `.mid` and `.midi` file is read.
        name: `"maestro"`, or `"midi"` for others.

    Raises:
        ValueError: A path without a MIDI file.
    """

    layout = "pieces"
    tokenizer_name = "REMI (MidiTok), 328 tokens"
    vocab_size = VOCAB_SIZE
    separator = EOS
    padding = PAD

    def __init__(self, paths: Sequence[Path], name: str = "maestro") -> None:
        self.name = name
        maestro = name == "maestro"
        self.licence = "CC BY-NC-SA 4.0" if maestro else "that of the files"
        self.homepage = (
            "https://magenta.withgoogle.com/datasets/maestro" if maestro else "files of the user"
        )
        self.paths = tuple(paths)
        self._files = find_files(paths, _SUFFIXES, "MIDI")

    def items(self) -> Iterator[Item]:
        """Yield one item a file. Reads all of them. See `Corpus.items`."""
        return (Item(name, (file.path, file.split)) for name, file in self._survey.items())

    def documents(self, item: Item) -> Iterator[TokenDocument]:
        """Yield the tracks of a file. See `Corpus.documents`."""
        path, split = item.payload
        score = read_midi(path)
        try:
            tracks = encode(score)
        except Exception as error:  # MidiTok raises whatever its parts do
            raise ValueError(f"{path}: MidiTok cannot take it ({_one_line(error)})") from error
        if not tracks:
            raise ValueError(f"{path}: holds no note in {LOWEST} .. {HIGHEST}, the piano's range")
        for index, tokens in enumerate(tracks):
            name = item.key if len(tracks) == 1 else f"{item.key} (track {index})"
            yield TokenDocument(split, tokens, name)

    def describe(self) -> dict[str, Any]:
        """Return source, counts, versions and choices."""
        files = self._survey.values()
        return {
            "source": ", ".join(map(str, self.paths)),
            "files": dict(Counter(file.split for file in files)),
            "pieces": len(group(self._keys)),
            "notes": sum(file.notes for file in files),
            "notes_out_of_range": sum(file.outside for file in files),
            "tokenizer": self.tokenizer_name,
            "versions": _versions(),
            "choices": {
                "split": "90 / 5 / 5 % of the files, at random, pieces whole",
                "pieces from": str(self._metadata_file or "file names and notes"),
                "documents": "one a track, BOS and EOS around",
                "pedals": "left out",
            },
        }

    def fingerprint(self) -> str:
        """Return a digest of files, names, metadata and tokenizer. See `Corpus.fingerprint`."""
        metadata = self._metadata_file
        return content_digest(
            {
                "format": _FORMAT,
                "corpus": "midi",
                "files": [[name, file_digest(path)] for name, path in self._files.items()],
                "metadata": file_digest(metadata) if metadata else None,
                "tokenizer": self.tokenizer_fingerprint,
                "versions": _versions(),
            }
        )

    @property
    def tokenizer_fingerprint(self) -> str:
        """A digest of the vocabulary. See `Corpus.tokenizer_fingerprint`."""
        return content_digest({"vocabulary": remi().vocab})

    def save_tokenizer(self, folder: Path) -> None:
        """Write MidiTok's `tokenizer.json`, which `miditok.REMI(params=file)` reads."""
        remi().save(folder / "tokenizer.json")

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The ids of pitches, which transposition shifts."""
        return {"pitch": (FIRST_PITCH, LAST_PITCH)}

    @cached_property
    def _metadata_file(self) -> Path | None:
        for path in self.paths:
            for suffix in ("csv", "json"):
                pattern = f"maestro-v*.{suffix}"
                found = path.rglob(pattern) if path.is_dir() else path.parent.glob(pattern)
                if file := min(found, default=None):
                    return file
        return None

    @cached_property
    def _scores(self) -> dict[str, tuple[str, int, int]]:
        # Digest of the notes, their number, and how many are out of range.
        return {name: _notes(read_midi(path)) for name, path in self._files.items()}

    @cached_property
    def _keys(self) -> dict[str, set[str]]:
        titles = read_metadata(self._metadata_file) if self._metadata_file else {}
        return {
            name: {f"notes {self._scores[name][0]}"}
            | titles.get(whole_name(path.name), {f"file {whole_name(name)}"})
            for name, path in self._files.items()
        }

    @cached_property
    def _survey(self) -> dict[str, _File]:
        splits = split_by_piece(self._keys)
        return {
            name: _File(path, splits[name], *self._scores[name][1:])
            for name, path in self._files.items()
        }


def read_midi(path: Path) -> Any:
    """Return the `symusic.Score` of a file.

    Raises:
        ValueError: It is no MIDI file, damaged or cut short, or holds no note.
    """
    symusic = need("symusic", "data")
    data = path.read_bytes()
    if not data.startswith(b"MThd") or len(data) < _HEADER:
        raise ValueError(f"{path}: is no MIDI file (it does not begin with a MIDI header)")
    expected, found = int.from_bytes(data[10:12], "big"), _count_tracks(data)
    # symusic reads a file that ends between two tracks as if it were whole.
    if found < expected:
        raise ValueError(f"{path}: is cut short: {found} of {expected} tracks are whole")
    try:
        score = symusic.Score.from_midi(data)
    except Exception as error:  # symusic raises RuntimeError, ValueError and others
        raise ValueError(f"{path}: is no whole MIDI file ({_one_line(error)})") from error
    if not any(len(track.notes) for track in score.tracks):
        raise ValueError(f"{path}: holds no notes")
    return score


def read_metadata(file: Path) -> dict[str, set[str]]:
    """Return `title_keys` of each performance by its file's `whole_name`, from MAESTRO's table.

    Raises:
        ValueError: The file is damaged or lacks a column.
    """
    columns = ("midi_filename", "canonical_composer", "canonical_title")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            content = json.loads(text)
            values = [[content[column][row] for row in content[columns[0]]] for column in columns]
            rows = list(zip(*values, strict=True))
        else:
            table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            rows = [tuple(row[column] for column in columns) for row in table]
        if not rows:
            raise ValueError("it names no performance")
        return {
            whole_name(name.rpartition("/")[2]): title_keys(composer, title)
            for name, composer, title in rows
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: {', '.join(columns)} are needed of each performance "
            f"({type(error).__name__}: {error})"
        ) from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}: is damaged or cut short ({_one_line(error)})") from error


def _count_tracks(data: bytes) -> int:
    # Track chunks that end within the data.
    place, tracks = 8 + int.from_bytes(data[4:8], "big"), 0
    while place + 8 <= len(data):
        end = place + 8 + int.from_bytes(data[place + 4 : place + 8], "big")
        tracks += data[place : place + 4] == b"MTrk" and end <= len(data)
        place = end
    return tracks


def _notes(score: Any) -> tuple[str, int, int]:
    digest, count, outside = hashlib.sha256(), 0, 0
    digest.update(str(score.ticks_per_quarter).encode())
    for track in score.tracks:
        columns = track.notes.numpy()
        lowest, highest = (27, 87) if track.is_drum else (LOWEST, HIGHEST)
        pitch = columns["pitch"]
        count += len(pitch)
        outside += int(((pitch < lowest) | (pitch > highest)).sum())
        for name in ("time", "duration", "pitch", "velocity"):
            digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest(), count, outside


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("miditok", "symusic")}


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
