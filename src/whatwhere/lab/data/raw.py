"""Finding the raw files of a data set: named, in a folder of data, in the cache, or fetched."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from whatwhere.lab.data.extras import need
from whatwhere.lab.data.tokens import default_cache_dir
from whatwhere.lab.storage import disk_errors, lock

DATA_VARIABLE = "WHATWHERE_DATA"
"""A folder of data sets, looked into before anything is fetched."""


@dataclass(frozen=True)
class Raw:
    """Where the raw files of a data set are.

    Attributes:
        licence: For the list of data sets; what counts is what the corpus itself says.
        folders: Below `$WHATWHERE_DATA`; the first that is there counts.
        file: The one file that counts there; `None` is the whole folder.
        url: What to fetch; `None` cannot be fetched.
        checksum: Of what is fetched, as `pooch` takes it: a SHA-256, or `md5:...`.
        archive: Whether what is fetched is a zip archive to unpack.
        what: For the user: what to bring.
    """

    licence: str
    folders: tuple[str, ...]
    file: str | None = None
    url: str | None = None
    checksum: str | None = None
    archive: bool = False
    what: str = ""


RAW: dict[str, Raw] = {
    "jsb": Raw(
        "none stated; the music is in the public domain",
        ("jsb",),
        "jsb-chorales-16th.json",
        "https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/"
        "9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d/jsb-chorales-16th.json",
        "8730aca7b64e7d29493733d1cf19fad4a5b351d8f1845e57dac27728104fd39f",
    ),
    "maestro": Raw(
        "CC BY-NC-SA 4.0",
        ("maestro", "midi"),
        None,
        "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/"
        "maestro-v3.0.0-midi.zip",
        "70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c",
        archive=True,
    ),
    "midi": Raw("that of the files", ("midi",), what="a folder of MIDI files"),
    # The checksum that UCSC publishes beside the file is an MD5.
    "genome": Raw(
        "no restriction on use",
        ("genome",),
        None,
        "https://hgdownload.soe.ucsc.edu/goldenPath/hg38/bigZips/hg38.fa.gz",
        "md5:1c9dcaddfa41027f17cd8f7a82c7293b",
    ),
    "fasta": Raw("that of the files", ("fasta",), what="FASTA files"),
    "text": Raw("that of the files", ("books",), what="UTF-8 text files"),
}


def find(name: str, paths: Sequence[str | Path], cache_dir: Path | None = None) -> list[Path]:
    """Return files and folders that hold the raw data of a set in `RAW`.

    The paths, if any are named; else what lies below `$WHATWHERE_DATA`; else what lies in the
    cache, where it is fetched to if it is not there.

    Raises:
        ValueError: A path does not exist, or nothing is here and nothing can be fetched; one line
            that says what to bring and where to put it.
        RunError: The disk is full.
    """
    if paths:
        return [_existing(path) for path in paths]
    raw = RAW[name]
    for folder in raw.folders:
        found = below_data(folder, raw.file)
        if found:
            return [found]
    cache = cached(name, cache_dir)
    if _files(cache):
        return [cache / raw.file] if raw.file and (cache / raw.file).exists() else [cache]
    if raw.url is None:
        raise ValueError(
            f"{name}: name {raw.what} with --from (or `paths` in a recipe), or put them into "
            f"{cache}"
        )
    return [_fetch(name, raw, cache)]


def below_data(folder: str, file: str | None = None) -> Path | None:
    """A folder (or a file in it) below `$WHATWHERE_DATA`, if it is there and not empty."""
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        return None
    place = Path(root).expanduser() / folder
    if file:
        return place / file if (place / file).is_file() else None
    return below(place)


def below(folder: Path) -> Path | None:
    """The folder, if it is there and not empty."""
    return folder if _files(folder) else None


def cached(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of the cache where raw files of a data set are looked for, and fetched to."""
    return (cache_dir or default_cache_dir()) / "raw" / name


def is_offline() -> bool:
    """Whether the user has said that nothing is to be fetched, as for the hub's own clients."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def bring(name: str, what: str, where_from: str, folder: Path, reason: str) -> ValueError:
    """The error that says what to bring, from where, and where to put it."""
    return ValueError(
        f"{name} is not on this machine and could not be fetched ({reason}): bring {what} from "
        f"{where_from} and put it into {folder}, or name it with --from"
    )


def _existing(path: str | Path) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        below = "" if place.is_absolute() else f" in {str(Path.cwd())!r}"
        raise ValueError(f"paths: {str(path)!r} does not exist{below}")
    return place


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if not file.name.startswith(".")]


def _fetch(name: str, raw: Raw, cache: Path) -> Path:
    assert raw.url is not None
    file = raw.url.rpartition("/")[2]
    what = f"the contents of {file}" if raw.archive else file
    if is_offline():
        raise bring(name, what, raw.url, cache, "HF_HUB_OFFLINE is set")
    pooch = need("pooch", "data")
    try:
        with lock(cache, wait=True), disk_errors(cache):
            if not _files(cache):  # Another process may have fetched it meanwhile.
                # Under a hidden name until all is there and unpacked.
                with TemporaryDirectory(dir=cache, prefix=".") as folder:
                    temporary = Path(folder)
                    pooch.retrieve(
                        raw.url,
                        raw.checksum,
                        file,
                        temporary,
                        processor=pooch.Unzip(extract_dir=".") if raw.archive else None,
                        progressbar=sys.stderr.isatty(),
                    )
                    if raw.archive:
                        (temporary / file).unlink()
                    for made in list(temporary.iterdir()):
                        made.replace(cache / made.name)
    except ValueError as error:  # What came has another checksum.
        raise bring(name, what, raw.url, cache, _reason(error)) from error
    except OSError as error:
        if error.errno is not None:  # Of this machine; those of the network have none.
            raise
        raise bring(name, what, raw.url, cache, _reason(error)) from error
    return cache if raw.archive else cache / file


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
