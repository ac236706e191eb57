"""Needle tasks on disk: prompts as JSON Lines, tasks as YAML, a record of what they are of."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whatwhere.lab import storage
from whatwhere.lab.data.sources import read_corpus
from whatwhere.lab.environment import git_commit, versions
from whatwhere.lab.harness.byte_tokenizer import byte_tokenizer
from whatwhere.lab.harness.needles import string_match, tasks
from whatwhere.lab.harness.needles.haystack import Haystack, count_all
from whatwhere.lab.harness.needles.kinds import unseen
from whatwhere.lab.harness.needles.prompts import TooShortError, hide, listing
from whatwhere.lab.harness.needles.settings import NeedleSettings
from whatwhere.lab.harness.settings import Settings
from whatwhere.lab.harness.subject import find, load_tokenizer, loading, tokenizer_digest

RECORD = "needles.json"
VARIETY = 4
"""Tokens of text read, in multiples of the longest prompt."""
LONG = 4096
"""From this length on words of a list stand there as often as in RULER's."""

Row = dict[str, Any]


def write(settings: NeedleSettings, say: Callable[[str], None]) -> Path:
    """Make needle tasks in a new folder.

    A length too short for a kind is left out and said.

    Args:
        settings: What to make.
        say: Shows a line.

    Returns:
        The folder.

    Raises:
        ValueError: If settings are out of range, text or tokenizer cannot be had, no length is
            long enough for its kind, or the folder holds something else.
        RunError: If it cannot be written.
    """
    settings.check()
    tokenizer = find_tokenizer(settings.tokenizer)
    corpus = read_corpus(settings.text)
    digests = [document.digest for document in corpus.documents]
    identity = settings.identity(tokenizer_digest(tokenizer), digests)
    folder = settings.output
    if _is_there(folder, identity):
        say(f"{folder} has these needles already")
        return folder
    text = "\n".join(document.text.decode() for document in corpus.documents)
    haystack = Haystack(text, tokenizer, VARIETY * max(settings.lengths))
    say(f"text: {haystack.tokens:,} tokens")
    with storage.disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.new_folder(folder) as partial:
        left_out = _write_all(settings, haystack, tokenizer, partial, say)
        shutil.copyfile(str(string_match.__file__), partial / "string_match.py")
        record = {
            "identity": identity,
            "left_out": left_out,
            "given": {"tokenizer": settings.tokenizer, "text": list(settings.text)},
            "versions": versions(),
            "git_commit": git_commit(),
        }
        storage.write_json(partial / RECORD, record)
        if folder.is_dir():  # an empty one
            folder.rmdir()
    return folder


def find_tokenizer(name: str) -> Any:
    """The tokenizer `bytes`, of a run or model, or by its own folder or name.

    Raises:
        ValueError: If it cannot be loaded.
    """
    if name == "bytes":
        return byte_tokenizer()
    folder = Path(name).expanduser()
    if any((folder / file).exists() for file in ("config.json", "run.json")):
        return load_tokenizer(find(name), Settings(model=name, tasks=()))
    from transformers import AutoTokenizer

    with loading(f"tokenizer {name}"):
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)


def _is_there(folder: Path, identity: dict[str, Any]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    path = folder / RECORD
    if path.is_file() and storage.read_json(path).get("identity") == identity:
        return True
    held = "other needles" if path.is_file() else "something else"
    raise ValueError(
        f"output: {folder} holds {held}: choose another --output, or remove that folder"
    )


def _write_all(
    settings: NeedleSettings,
    haystack: Haystack,
    tokenizer: Any,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, str]:
    generated: list[str] = []
    chosen: list[str] = []
    left_out: dict[str, str] = {}
    for kind in settings.kinds:
        for length in sorted(set(settings.lengths)):
            started = time.monotonic()
            try:
                answer, rows = _rows(settings, kind, length, haystack, tokenizer)
            except TooShortError as error:
                left_out[f"{kind} {length}"] = str(error)
                say(f"{kind} {length:,}: left out, {error}")
                continue
            file, task = f"{kind}_{length}.jsonl", f"{settings.name}_{kind}_{length}"
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            storage.write_text(folder / file, "\n".join(lines) + "\n")
            yaml = tasks.generate(task, kind, length, file, answer)
            storage.write_text(folder / f"{task}.yaml", yaml)
            generated.append(task)
            if rows[0]["options"]:
                task = f"{settings.name}_choice_{kind}_{length}"
                yaml = tasks.choose(task, kind, length, file)
                storage.write_text(folder / f"{task}.yaml", yaml)
                chosen.append(task)
            least = min(row["length"] for row in rows)
            seconds = time.monotonic() - started
            say(f"{kind} {length:,}: {len(rows)} prompts of {least:,} or more, {seconds:.1f} s")
    if not generated:
        raise ValueError(f"lengths: none is long enough; {next(iter(left_out.values()))}")
    groups = [(settings.name, generated, "string_match_all")]
    groups += [(f"{settings.name}_choice", chosen, "acc")] if chosen else []
    for name, members, metric in groups:
        storage.write_text(folder / f"{name}.yaml", tasks.group(name, members, metric))
    return left_out


def _rows(
    settings: NeedleSettings, kind: str, length: int, haystack: Haystack, tokenizer: Any
) -> tuple[int, list[Row]]:
    """Tokens for the answer, and the items of a kind and length."""
    if kind == "counting":
        return _counting(settings, length, haystack, tokenizer)
    draws = [random.Random(f"{settings.seed} {kind} {length} {i}") for i in range(settings.items)]
    riddles = [unseen(kind, draw, haystack.text) for draw in draws]
    answer = _answer_tokens([riddle.outputs for riddle in riddles], tokenizer)
    rows = []
    for index, (riddle, draw) in enumerate(zip(riddles, draws, strict=True)):
        depth = index / (settings.items - 1) if settings.items > 1 else 0.5
        with _of_length(length, answer):
            prompt = hide(riddle, haystack, tokenizer, length - answer, depth, draw)
        rows.append(
            {
                "index": index,
                "input": prompt.text,
                "gen_prefix": prompt.prefix,
                "outputs": list(riddle.outputs),
                "length": prompt.tokens + answer,
                "max_length": length,
                "kind": kind,
                "depth": list(prompt.depths),
                "options": list(riddle.options),
                "answer": riddle.options.index(riddle.outputs[0]) if riddle.options else -1,
            }
        )
    return answer, rows


def _counting(
    settings: NeedleSettings, length: int, haystack: Haystack, tokenizer: Any
) -> tuple[int, list[Row]]:
    words = haystack.words()
    longest = sorted(words, key=len)[-3:]
    answer = _answer_tokens([tuple(longest)], tokenizer)
    rows = []
    for index in range(settings.items):
        seed = f"{settings.seed} counting {length} {index}"
        with _of_length(length, answer):
            made = listing(words, tokenizer, length - answer, length >= LONG, seed)
        rows.append(
            {
                "index": index,
                "input": made.prompt.text,
                "gen_prefix": made.prompt.prefix,
                "outputs": list(made.common),
                "length": made.prompt.tokens + answer,
                "max_length": length,
                "kind": "counting",
                "depth": [],
                "options": [],
                "answer": -1,
            }
        )
    return answer, rows


@contextmanager
def _of_length(length: int, answer: int) -> Iterator[None]:
    """Say what is too short in lengths of prompt and answer together."""
    try:
        yield
    except TooShortError as error:
        raise TooShortError(length, error.least + answer) from error


def _answer_tokens(answers: list[tuple[str, ...]], tokenizer: Any) -> int:
    """Tokens that the model may write: what the answers take, and a quarter more."""
    written: Iterator[str] = (f" {', '.join(outputs)}" for outputs in answers)
    most = max(count_all(list(written), tokenizer))
    return most + most // 4 + 4
