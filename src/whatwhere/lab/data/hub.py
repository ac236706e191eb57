"""Text data sets of the Hugging Face hub, streamed through `datasets`, one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from whatwhere.lab.data import raw, records
from whatwhere.lab.data.corpus import CorpusSplit, Item
from whatwhere.lab.data.documents import Text, TextDocuments
from whatwhere.lab.data.extras import need
from whatwhere.lab.data.textfiles import spread
from whatwhere.lab.storage import RunError

LLAMA_3 = "meta-llama/Meta-Llama-3-8B"


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, and what is chosen where the papers leave it open.

    Attributes:
        repository: On the hub.
        config: Its configuration.
        revision: Commit or branch.
        licence: As its card says.
        tokenizer: Unless another is given.
        splits: Ours, and what they are called there.
        validation_fraction: Share of training documents kept for validation, if it has no
            validation split.
        urls: File of the repository that lists the addresses of its parts, one a line.
    """

    repository: str
    licence: str
    tokenizer: str
    config: str | None = None
    revision: str = "main"
    splits: dict[CorpusSplit, str] = field(default_factory=lambda: {"train": "train"})
    validation_fraction: float = 0.0005
    urls: str | None = None

    @property
    def homepage(self) -> str:
        """Its page."""
        return f"https://huggingface.co/datasets/{self.repository}"


HUB: dict[str, HubSet] = {
    # Of its 8,013,769 documents, 0.05 % make the 4 million validation tokens of the PoPE paper.
    "openwebtext": HubSet(
        "Skylion007/openwebtext",
        "CC0 1.0 (the collection; the texts are their authors')",
        "gpt2",
        revision="79d93d786212f7344586290adb811d4ae6a1762c",
    ),
    # deepmind/pg19 is a loading script, which `datasets` no longer runs.
    "pg19": HubSet(
        "emozilla/pg19",
        "Apache 2.0 (the collection; the books are in the public domain in the USA)",
        "gpt2",
        revision="c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
        splits={"train": "train", "validation": "validation", "test": "test"},
        validation_fraction=0.0,
    ),
    "fineweb": HubSet(
        "HuggingFaceFW/fineweb",
        "ODC-By 1.0",
        LLAMA_3,
        config="sample-10BT",
        revision="9bb295ddab0e05d785b879661af7260fed5140fc",
    ),
    "fineweb-edu": HubSet(
        "HuggingFaceFW/fineweb-edu",
        "ODC-By 1.0",
        LLAMA_3,
        config="sample-10BT",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    ),
    # Its repository is a loading script, too, and a list of where its parts are.
    "dolma": HubSet(
        "allenai/dolma",
        "ODC-By 1.0",
        LLAMA_3,
        revision="7f48140530a023e9ea4c5cfb141160922727d4d3",
        validation_fraction=0.0001,
        urls="urls/v1_7.txt",
    ),
}


class HubTexts(TextDocuments):
    """A data set of the hub, streamed: an item is one of the files it is stored in.

    Files are read in the order of the hub, never shuffled, so that a preparation can go on where
    it stopped.

    Args:
        name: In `HUB`.
        tokenizer: The set's own by default; see `TextDocuments`.
        max_bytes: Read this much text at most: an equal share of files spread over the set.
            Validation and test splits of its own do not count, and are read whole.
        only: One of its own splits, to read nothing else.
        cache_dir: Where the user is told to put files, if the hub cannot be reached.

    Raises:
        ValueError: The tokenizer cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        tokenizer: str | None = None,
        *,
        max_bytes: int | None = None,
        only: CorpusSplit | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.set = HUB[name]
        super().__init__(tokenizer or self.set.tokenizer, self.set.validation_fraction)
        self.name, self.licence, self.homepage = name, self.set.licence, self.set.homepage
        self.max_bytes, self.only, self.cache_dir = max_bytes, only, cache_dir

    def items(self) -> Iterator[Item]:
        """Yield the files that the set is stored in, split by split.

        Raises:
            ValueError: The hub cannot be reached; one line that says what to bring.
        """
        if raw.is_offline():
            raise self._absent("HF_HUB_OFFLINE is set")
        found = list(self._parts())
        train = [part for part in found if part[0] == "train"]
        limit = None
        if self.max_bytes is not None:
            train, limit = spread(train, self.max_bytes)
        for split, number, place in [*train, *(part for part in found if part[0] != "train")]:
            yield Item(f"{split}:{number}", (split, place, limit if split == "train" else None))

    def texts(self, item: Item) -> Iterator[Text]:
        """Yield the texts of one file.

        Raises:
            RunError: The network failed.
        """
        split, place, limit = item.payload
        fixed: CorpusSplit | None = split
        if split == "train" and "validation" not in self.set.splits:
            fixed = None  # The digest decides.
        for name, text in records.limited(self._read(item.key, split, place), limit):
            yield Text(name, text, fixed)

    def source_fingerprint(self) -> list[Any]:
        """See `TextDocuments.source_fingerprint`; a branch is taken to stay as it is."""
        found = self.set
        return [
            "hub",
            1,
            found.repository,
            found.config,
            found.revision,
            found.urls,
            self.max_bytes,
            *([self.only] if self.only else []),
        ]

    def describe(self) -> dict[str, Any]:
        """See `Corpus.describe`."""
        return {
            "source": self.homepage,
            "config": self.set.config,
            "revision": self.set.revision,
            "list_of_files": self.set.urls,
            "splits": dict(self.set.splits),
            "validation_fraction": self.validation_fraction,
            "max_bytes": self.max_bytes,
            "only": self.only,
        }

    def _parts(self) -> Iterator[tuple[CorpusSplit, int, Any]]:
        # Split, number in it, and where it is: an address, or (number, count).
        if self.set.urls:
            for number, address in enumerate(self._addresses()):
                yield "train", number, address
            return
        for split in self.set.splits:
            if self.only not in (None, split):
                continue
            count = self._reached(partial(self._count, split))
            for number in range(count):
                yield split, number, (number, count)

    def _addresses(self) -> list[str]:
        hub = need("huggingface_hub", "data")
        listed = self._reached(
            lambda: hub.hf_hub_download(
                self.set.repository,
                self.set.urls,
                repo_type="dataset",
                revision=self.set.revision,
            )
        )
        lines = Path(listed).read_text(encoding="utf-8").split("\n")
        return [line.strip() for line in lines if line.strip()]

    def _count(self, split: CorpusSplit) -> int:
        return int(self._stream(split).num_shards)

    def _stream(self, split: CorpusSplit) -> Any:
        datasets = need("datasets", "data")
        return datasets.load_dataset(
            self.set.repository,
            self.set.config,
            split=self.set.splits[split],
            revision=self.set.revision,
            streaming=True,
        )

    def _read(self, key: str, split: CorpusSplit, place: Any) -> Iterator[tuple[str, bytes]]:
        if isinstance(place, str):  # Lines of JSON, whatever other fields they have.
            for number, row in enumerate(self._rows(key, split, place), start=1):
                where = f"{place}, line {number}"
                yield where, records.parse_line(row["text"], where)
            return
        for number, row in enumerate(self._rows(key, split, place)):
            yield f"{key}:{number}", records.text_of(row, f"{self.name}, {key}:{number}")

    def _rows(self, key: str, split: CorpusSplit, place: Any) -> Iterator[dict[str, Any]]:
        datasets = need("datasets", "data")
        try:
            if isinstance(place, str):
                yield from datasets.load_dataset(
                    "text", data_files=[place], split="train", streaming=True
                )
                return
            index, count = place
            part = self._stream(split).shard(num_shards=count, index=index)
            yield from part.select_columns(["text"])
        except Exception as error:  # Whatever the clients below `datasets` raise.
            raise RunError(
                f"{self.name}: reading {key} failed ({_reason(error)}): run the same command "
                "again to go on"
            ) from error

    def _reached(self, ask: Callable[[], Any]) -> Any:
        logging = need("huggingface_hub.utils.logging", "data")
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # It tells of each time it tries again.
        try:
            return ask()
        except Exception as error:  # Whatever the clients below `datasets` raise.
            raise self._absent(_reason(error)) from error
        finally:
            logging.set_verbosity(before)

    def _absent(self, reason: str) -> ValueError:
        what = "its files (Parquet, JSON lines or text)"
        return raw.bring(
            self.name, what, self.homepage, raw.cached(self.name, self.cache_dir), reason
        )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
