"""Turning a corpus into a prepared folder: in parallel, resumably, the same bytes each time.

Each item of the corpus becomes a part of its own below `.parts`, written under a temporary name
and then recorded, so that a preparation that was killed goes on with the items that have no
record. Once all are there, consecutive parts are joined to shards: which ones follows from their
sizes alone, not from who made them or when.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from whatwhere.lab import environment, storage
from whatwhere.lab.console import counting
from whatwhere.lab.data import shards
from whatwhere.lab.data.corpus import Corpus, CorpusSplit, Item
from whatwhere.lab.data.pool import cores, run_all
from whatwhere.lab.data.shards import PreparedFolder

SHARD_TOKENS = 2**27
"""Tokens from which on a shard takes no further part."""

PARTS = ".parts"
_SPLITS: tuple[CorpusSplit, ...] = get_args(CorpusSplit)
_COPIED_AT_ONCE = 2**22


class ArrayFile:
    """A one-dimensional `.npy` file that grows: it is never in memory as a whole.

    Args:
        path: The file, which is there once the context ends without an error.
        dtype: Of its elements.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self.count = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> ArrayFile:
        self._file = self._temporary.open("wb")
        self._write_header()
        return self

    def append(self, values: NDArray[Any]) -> None:
        """Write elements after those that are there."""
        self._file.write(values.astype(self.dtype, copy=False).data)
        self.count += len(values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                if error is None:
                    # numpy leaves room in the header for any count, so that it keeps its size.
                    self._file.seek(0)
                    self._write_header()
            if error is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _write_header(self) -> None:
        descr = npy.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.count,)}
        npy.write_array_header_1_0(self._file, header)


def prepare(
    corpus: Corpus,
    output: Path,
    workers: int | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
    title: str = "",
    wait: bool = False,
) -> PreparedFolder:
    """Write a corpus into a folder of shards and open it; do nothing if that was done before.

    Args:
        corpus: What to prepare.
        output: A new folder, or one that an earlier call began: what is done there is kept, unless
            it is of another corpus or the source was changed since.
        workers: Processes; as many as there are cores by default.
        shard_tokens: A shard takes parts until it has this many tokens.
        title: Of the progress bar; the corpus's name by default.
        wait: Wait for another process that works in the folder, rather than raise.

    Raises:
        ValueError: The source is missing or damaged, or the folder holds something else.
        RunError: Another process works in the folder, the disk is full, or a worker died.
    """
    fingerprint = corpus.fingerprint()
    _check_output(output, fingerprint)
    if shards.is_prepared(output):
        return PreparedFolder(output)
    corpus.take_left_out()
    items = list(corpus.items())
    left_out = corpus.take_left_out()
    _check_items(items, corpus)
    with storage.lock(output, wait=wait), storage.disk_errors(output):
        _check_output(output, fingerprint)
        if not shards.is_prepared(output):
            job = _Job(corpus, output, shard_tokens)
            _begin(job, items, fingerprint)
            _tokenize(job, items, workers or cores(), title or corpus.name)
            _finish(job, items, fingerprint, left_out)
        return PreparedFolder(output)


@dataclass(frozen=True)
class _Job:
    # What each worker is given once.
    corpus: Corpus
    output: Path
    shard_tokens: int

    @property
    def parts(self) -> Path:
        return self.output / PARTS

    @property
    def dtype(self) -> np.dtype[Any]:
        return shards.token_dtype(self.corpus.vocab_size)

    def record(self, number: int) -> Path:
        return self.parts / f"{number:08d}.json"

    def arrays(self, number: int, split: str) -> tuple[Path, Path]:
        name = f"{number:08d}-{split}"
        return self.parts / f"{name}.tokens.npy", self.parts / f"{name}.bounds.npy"


@dataclass(frozen=True)
class _Shard:
    # A shard to be made of the parts of consecutive items.
    split: CorpusSplit
    number: int
    items: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def _check_output(output: Path, fingerprint: str) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; name a folder")
    found = {file.name for file in output.iterdir()} if output.exists() else set()
    if shards.MANIFEST in found:
        known = shards.read_manifest(output).fingerprint
    elif PARTS not in found and found - {".lock"}:
        raise ValueError(f"output: {output} holds other files; name a new folder")
    else:
        return
    if known != fingerprint:
        raise ValueError(
            f"output: {output} was prepared from another source, tokenizer or options; name a "
            "new folder, or remove that one"
        )


def _check_items(items: list[Item], corpus: Corpus) -> None:
    if not items:
        raise ValueError(f"{corpus.name}: the source holds nothing to prepare")
    keys = Counter(item.key for item in items)
    key, times = keys.most_common(1)[0]
    if times > 1:
        raise ValueError(f"{corpus.name}: {key!r} comes {times} times in the source")


def _begin(job: _Job, items: list[Item], fingerprint: str) -> None:
    plan = job.parts / "plan.json"
    if plan.exists():
        same = storage.read_json(plan)["fingerprint"] == fingerprint
        if not same or not all(_fits(job, n, item) for n, item in enumerate(items)):
            # The source was mended, or its files moved: neither parts nor shards are its own.
            for split in _SPLITS:
                _remove(job.output.glob(f"{split}-*.npy"))
            shutil.rmtree(job.parts)
    job.parts.mkdir(exist_ok=True)
    for folder in (job.parts, job.output):
        _remove(folder.glob(".*.partial"))  # of a kill
    if not plan.exists():
        storage.write_json(plan, {"fingerprint": fingerprint})


def _fits(job: _Job, number: int, item: Item) -> bool:
    # Whether what is recorded under a number, if anything, is of this item.
    record = job.record(number)
    return not record.exists() or bool(storage.read_json(record)["key"] == item.key)


def _tokenize(job: _Job, items: list[Item], workers: int, title: str) -> None:
    todo = [(n, item) for n, item in enumerate(items) if not job.record(n).exists()]
    tokens = 0
    with counting(title, len(items), len(items) - len(todo)) as shown:
        for made in run_all(_make_part, job, todo, workers):
            tokens += made
            shown.advance(f"{tokens / 1e6:.1f}M tokens")


def _make_part(job: _Job, numbered: tuple[int, Item]) -> int:
    # Write the documents of an item, then its record; return its tokens.
    number, item = numbered
    with storage.disk_errors(job.output):
        job.corpus.take_left_out()
        with ExitStack() as stack:
            writers: dict[str, _PartWriter] = {}
            for document in job.corpus.documents(item):
                if document.split not in writers:
                    part = _PartWriter(*job.arrays(number, document.split), job.dtype)
                    writers[document.split] = stack.enter_context(part)
                _check_tokens(document.tokens, job.corpus, document.name)
                writers[document.split].add(document.tokens)
        counts = {s: [len(w.bounds) - 1, w.bounds[-1]] for s, w in writers.items()}
        record = {"key": item.key, "splits": counts, "left_out": job.corpus.take_left_out()}
        storage.write_json(job.record(number), record)
    return sum(tokens for _, tokens in counts.values())


class _PartWriter:
    # The documents of one split of one item.

    def __init__(self, tokens: Path, bounds: Path, dtype: np.dtype[Any]) -> None:
        self._tokens = ArrayFile(tokens, dtype)
        self._bounds_file = bounds
        self.bounds = [0]

    def __enter__(self) -> _PartWriter:
        self._tokens.__enter__()
        return self

    def add(self, tokens: NDArray[np.unsignedinteger]) -> None:
        self._tokens.append(tokens)
        self.bounds.append(self._tokens.count)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._tokens.__exit__(kind, error, trace)
        if error is None:
            write_array(self._bounds_file, np.array(self.bounds, dtype="<i8"))


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array as `.npy` under a temporary name, then rename it into place."""
    with ArrayFile(path, values.dtype) as file:
        file.append(values)


def _check_tokens(tokens: NDArray[Any], corpus: Corpus, name: str) -> None:
    if not len(tokens) or int(tokens.max()) >= corpus.vocab_size:
        what = f"the id {int(tokens.max())}" if len(tokens) else "no token"
        raise ValueError(
            f"{corpus.name}: document {name!r} has {what}; ids below {corpus.vocab_size} "
            "are expected"
        )


def _finish(job: _Job, items: list[Item], fingerprint: str, before: dict[str, int]) -> None:
    records = [storage.read_json(job.record(number)) for number in range(len(items))]
    needed = job.corpus.only or "train"
    if not any(needed in record["splits"] for record in records):
        what = "training" if needed == "train" else needed
        raise ValueError(f"{job.corpus.name}: the source gives no {what} document")
    splits: dict[CorpusSplit, shards.SplitRecord] = {}
    for split in _SPLITS:
        counts = {n: r["splits"][split] for n, r in enumerate(records) if split in r["splits"]}
        if counts:
            planned = _plan(split, {n: tokens for n, (_, tokens) in counts.items()}, job)
            splits[split] = shards.SplitRecord(
                documents=sum(documents for documents, _ in counts.values()),
                tokens=sum(tokens for _, tokens in counts.values()),
                shards=tuple(_join(job, shard) for shard in planned),
            )
    left_out = Counter(before)
    for record in records:
        left_out.update(record["left_out"])
    manifest = _manifest(job, splits, dict(sorted(left_out.items())), fingerprint)
    storage.write_json(job.output / shards.MANIFEST, manifest.model_dump(mode="json"))
    shards.mark_verified(job.output, manifest)  # The checksums are of what was just written.
    shutil.rmtree(job.parts)


def _plan(split: CorpusSplit, sizes: dict[int, int], job: _Job) -> Iterator[_Shard]:
    # Consecutive items, until a shard has enough.
    number, chosen, tokens = 0, [], 0
    for item, size in sizes.items():
        chosen.append(item)
        tokens += size
        if tokens >= job.shard_tokens:
            yield _Shard(split, number, tuple(chosen))
            number, chosen, tokens = number + 1, [], 0
    if chosen:
        yield _Shard(split, number, tuple(chosen))


def _join(job: _Job, shard: _Shard) -> shards.ShardRecord:
    # Write a shard and its record, then remove its parts: at most one shard is there twice.
    note = job.parts / f"{shard.name}.json"
    if note.exists():
        return shards.ShardRecord.model_validate(storage.read_json(note))
    tokens, bounds = (job.output / f"{shard.name}.{kind}.npy" for kind in ("tokens", "bounds"))
    with ArrayFile(tokens, job.dtype) as file, ArrayFile(bounds, np.dtype("<i8")) as ends:
        ends.append(np.zeros(1, dtype=np.int64))
        for number in shard.items:
            part, limits = (np.load(p, mmap_mode="r") for p in job.arrays(number, shard.split))
            ends.append(limits[1:] + file.count)
            for first in range(0, len(part), _COPIED_AT_ONCE):
                file.append(part[first : first + _COPIED_AT_ONCE])
    record = shards.ShardRecord(
        file=tokens.name,
        bounds=bounds.name,
        documents=ends.count - 1,
        tokens=file.count,
        bytes=tokens.stat().st_size,
        sha256=shards.sha256_of(tokens),
        bounds_bytes=bounds.stat().st_size,
        bounds_sha256=shards.sha256_of(bounds),
    )
    storage.write_json(note, record.model_dump(mode="json"))
    _remove(path for number in shard.items for path in job.arrays(number, shard.split))
    return record


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _manifest(
    job: _Job,
    splits: dict[CorpusSplit, shards.SplitRecord],
    left_out: dict[str, int],
    fingerprint: str,
) -> shards.Manifest:
    corpus = job.corpus
    choices = corpus.describe()
    return shards.Manifest(
        format=1,
        name=corpus.name,
        source=str(choices.pop("source", "")),
        licence=corpus.licence,
        homepage=corpus.homepage,
        fingerprint=fingerprint,
        tokenizer=shards.TokenizerRecord(
            name=corpus.tokenizer_name,
            fingerprint=corpus.tokenizer_fingerprint,
            vocab_size=corpus.vocab_size,
            separator=corpus.separator,
            padding=corpus.padding,
            files=_save_tokenizer(job),
        ),
        ranges=corpus.ranges,
        layout=corpus.layout,
        choices=choices,
        left_out=left_out,
        splits=splits,
        versions=environment.versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git_commit=environment.git_commit(),
    ).signed()


def _save_tokenizer(job: _Job) -> dict[str, str]:
    folder = job.output / shards.TOKENIZER
    shutil.rmtree(folder, ignore_errors=True)  # of a kill between here and the manifest
    with storage.new_folder(folder) as temporary:
        job.corpus.save_tokenizer(temporary)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        folder.rmdir()
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
