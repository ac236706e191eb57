"""Preparing text, in MB/s of one core, and loading it, over what a training step takes.

    python benchmarks/data.py --books ../shared/data/books

A byte-level BPE of 8192 tokens is trained on one book. Tokens are compared with those of
`transformers`' own call before anything is timed. The loader's figure is tokens a second
over those of a training step of the quick preset whose batches it makes, on one thread.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro

from interleaved import ratios, rounds, write
from whatwhere.lab import recipes
from whatwhere.lab.data import Task, TokensData, make_task
from whatwhere.lab.data.catalogue import make_corpus
from whatwhere.lab.data.prepare import prepare
from whatwhere.lab.recipes import EncodingChoice, Recipe
from whatwhere.lab.train import build_model

VERSIONS = {name: importlib.metadata.version(name) for name in ("tokenizers", "numpy")}
DOCUMENT = 4000
"""Characters of a document of the web, about."""


def train_tokenizer(book: Path, folder: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    backend.train([str(book)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.save_pretrained(folder)
    return str(folder)


def as_lines(books: list[Path], file: Path) -> Path:
    """The books as JSON lines of documents as long as those of the web."""
    with file.open("w", encoding="utf-8") as out:
        for book in books:
            text = book.read_text(encoding="utf-8-sig")
            for start in range(0, len(text), DOCUMENT):
                out.write(json.dumps({"text": text[start : start + DOCUMENT]}) + "\n")
    return file


def check(corpus: Any) -> None:
    """Compare the tokens of each document with those of transformers' own call."""
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(corpus.tokenizer_name)
    for item in corpus.items():
        texts = [text.text.decode() for text in corpus.texts(item)]
        wanted = stock(texts, add_special_tokens=False, verbose=False)["input_ids"]
        found = [document.tokens.tolist() for document in corpus.documents(item)]
        if found != [[*ids, corpus.separator] for ids in wanted]:
            raise SystemExit("tokens differ from those of transformers; nothing was timed")


def preparation(books: list[Path], place: Path, count: int) -> list[dict[str, Any]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = train_tokenizer(books[0], place / "tokenizer")
    lines = as_lines(books, place / "books.jsonl")
    kinds = {
        "books, BPE": ([str(book) for book in books], tokenizer),
        "JSON lines of 4 kB, BPE": ([str(lines)], tokenizer),
        "books, bytes": ([str(book) for book in books], "bytes"),
    }
    megabytes = sum(book.stat().st_size for book in books) / 1e6
    cpu: dict[str, list[float]] = {name: [] for name in kinds}

    def side(name: str) -> Callable[[], None]:
        paths, chosen = kinds[name]
        corpus = make_corpus("text", paths, tokenizer=chosen)
        if chosen != "bytes":
            check(corpus)

        def go() -> None:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                before = time.process_time()
                prepare(corpus, Path(folder, "out"), 1)
                cpu[name].append(time.process_time() - before)

        return go

    taken = rounds({name: side(name) for name in kinds}, count)
    return [
        {
            "measure": "preparation",
            "what": name,
            "median": f"{megabytes / statistics.median(cpu[name][1:]):.2f}",
            "least": f"{megabytes / max(cpu[name][1:]):.2f}",
            "unit": "MB/s of CPU time, one core",
            "wall": f"{megabytes / statistics.median(taken[name]):.2f}",
        }
        for name in kinds
    ]


def stepper(recipe: Recipe, task: Task) -> Callable[[], None]:
    model = build_model(recipe.model, task, EncodingChoice(name="rope"), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = task.train_batch(0, 0, recipe.training.batch_size)

    def step() -> None:
        model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loader(recipe: Recipe, task: Task) -> Callable[[], None]:
    steps = iter(range(10**9))

    def load() -> None:
        task.train_batch(0, next(steps), recipe.training.batch_size)

    return load


def loading(books: list[Path], place: Path, count: int) -> list[dict[str, Any]]:
    text, indirect = recipes.get("text"), recipes.get("indirect-indexing")
    named = tuple(str(book) for book in books)
    tokens = TokensData(paths=named, length=text.data.length)  # type: ignore[union-attr]
    tasks = {
        "text, quick: text in memory": (text, make_task(text.data, place)),
        "text, quick: prepared stream": (text, make_task(tokens, place)),
        "text, quick: prepared pieces": (
            text,
            make_task(tokens.model_copy(update={"layout": "pieces"}), place),
        ),
        "indirect-indexing, quick": (indirect, make_task(indirect.data)),
    }
    rows = []
    for name, (recipe, task) in tasks.items():
        load = loader(recipe, task)

        def tenfold(load: Callable[[], None] = load) -> None:
            for _ in range(10):  # One is too short for the clock.
                load()

        taken = rounds({"load": tenfold, "step": stepper(recipe, task)}, count)
        median, _ = ratios(taken, to="load")["step"]
        least = min(s / ten for ten, s in zip(taken["load"], taken["step"], strict=True))
        rows.append(
            {
                "measure": "loader / step",
                "what": name,
                "median": f"{10 * median:.1f}",
                "least": f"{10 * least:.1f}",
                "unit": "tokens/s over tokens/s",
                "wall": "",
            }
        )
    return rows


def main(books: Path | None = None, count: int = 9) -> None:
    """Measure and write results/data.csv."""
    torch.set_num_threads(1)
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = books or Path(os.environ.get("WHATWHERE_DATA", default)) / "books"
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise SystemExit(f"no books in {folder}: name a folder of .txt files with --books")
    with tempfile.TemporaryDirectory() as place:
        rows = preparation(found, Path(place), max(3, count // 3))
        rows += loading(found, Path(place), count)
    for row in rows:
        print(*row.values(), sep="\t")
    print(write("data", [{**row, **VERSIONS} for row in rows]))


if __name__ == "__main__":
    tyro.cli(main)
