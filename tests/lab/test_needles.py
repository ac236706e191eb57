from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness_cases import bytes_model, folder_unchanged, llama, no_network, tokenizer

from whatwhere.cli import main
from whatwhere.lab.harness.byte_tokenizer import byte_tokenizer
from whatwhere.lab.harness.needles.haystack import Haystack, count
from whatwhere.lab.harness.needles.kinds import HIDDEN, KINDS
from whatwhere.lab.harness.needles.settings import NeedleSettings
from whatwhere.lab.harness.needles.string_match import process_results
from whatwhere.lab.harness.needles.write import write

ITEMS = 5


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of made-up sentences with many different words, quotes and accents."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(3, 9))) for _ in range(3000)]
    sentences = [
        f"{' '.join(draw.choices(words, k=draw.randint(4, 20))).capitalize()}{end}"
        for end in draw.choices([".", "!”", "?", "; élan."], k=4000)
    ]
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_text("\n".join(sentences), encoding="utf-8")
    return str(path)


def made(book: str, tokens: str, folder: Path, **changes: Any) -> list[str]:
    """Write needles; return what is said."""
    said: list[str] = []
    given: dict[str, Any] = {"lengths": (512, 2048), "items": ITEMS, **changes}
    write(NeedleSettings((book,), tokens, folder, **given), said.append)
    return said


def items(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", ["bytes", "pairs"])
def test_prompts_have_the_length_asked_for(
    kind: str, tokens: str, book: str, tmp_path: Path
) -> None:
    """Never longer, and shorter by less than the longest word with its number in a list."""
    if tokens == "pairs":
        name = str(tmp_path / "tokenizer")
        tokenizer().save_pretrained(name)
    else:
        name = tokens
    counter = byte_tokenizer() if tokens == "bytes" else tokenizer()
    made(book, name, tmp_path / "out", kinds=(kind,), lengths=(640, 3000))
    for length in (640, 3000):
        rows = items(tmp_path / "out" / f"{kind}_{length}.jsonl")
        (answer,) = {
            row["length"] - count(f"{row['input']} {row['gen_prefix']}", counter) for row in rows
        }
        for row in rows:
            assert length - 24 < row["length"] <= length == row["max_length"]
            written = counter(f" {', '.join(row['outputs'])}", add_special_tokens=False)
            assert len(written["input_ids"]) <= answer
            if kind != "counting":
                assert all(output in row["input"] for output in row["outputs"])


@pytest.mark.parametrize("kind", HIDDEN)
def test_needles_are_hidden_once_at_even_depths(kind: str, book: str, tmp_path: Path) -> None:
    made(book, "bytes", tmp_path / "out", kinds=(kind,), lengths=(8192,), items=9)
    rows = items(tmp_path / "out" / f"{kind}_8192.jsonl")
    depths = sorted(depth for row in rows for depth in row["depth"])
    for row in rows:
        found = [row["input"].index(needle) for needle in _needles(row)]
        assert all(row["input"].count(needle) == 1 for needle in _needles(row))
        told = [(place - 60) / (8192 - 200) for place in sorted(found)]
        # A needle stands at the nearest sentence end: within half a sentence, here 1 %.
        for depth, place in zip(row["depth"], told, strict=False):
            assert depth == pytest.approx(place, abs=0.05)
    if kind == "single":
        assert depths == pytest.approx([i / 8 for i in range(9)], abs=0.02)
    if len(rows[0]["depth"]) > 1:  # all together they cover the text evenly
        steps = [b - a for a, b in pairwise(depths)]
        assert depths[0] < 0.02 and depths[-1] > 0.98 and max(steps) < 0.06


def _needles(row: dict[str, Any]) -> list[str]:
    if row["kind"] == "tracking":
        return [f"VAR {name} = " for name in row["outputs"]]
    return [f" is {value}." for value in row["outputs"]]


def test_counted_words_are_the_most_frequent(book: str, tmp_path: Path) -> None:
    made(book, "bytes", tmp_path / "out", kinds=("counting",))
    for row in items(tmp_path / "out" / "counting_2048.jsonl"):
        listed = row["input"].split("\n\n")[1].split(" ")[1::2]
        often = sorted(set(listed), key=listed.count, reverse=True)
        assert set(often[:3]) == set(row["outputs"])
        assert listed.count(often[3]) < min(listed.count(word) for word in row["outputs"])


def test_options_have_the_answer_once(book: str, tmp_path: Path) -> None:
    made(book, "bytes", tmp_path / "out", kinds=("multikey",))
    rows = items(tmp_path / "out" / "multikey_2048.jsonl")
    for row in rows:
        assert row["options"][row["answer"]] == row["outputs"][0]
        assert len(set(row["options"])) == 10
        # The other numbers that are hidden are offered, too: reading the key is needed.
        assert sum(f" is {option}." in row["input"] for option in row["options"]) == 4
    assert len({row["answer"] for row in rows}) > 1


def test_the_same_seed_gives_the_same_files(book: str, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        made(book, "bytes", tmp_path / name, lengths=(1024,), seed=seed)
    for path in (tmp_path / "one").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "three" / path.name).read_bytes()


def test_a_length_too_short_for_a_kind_is_left_out_and_said(book: str, tmp_path: Path) -> None:
    said = made(book, "bytes", tmp_path / "out", lengths=(256, 1024), kinds=("single", "tracking"))
    (line,) = [line for line in said if "left out" in line]
    assert line.startswith("tracking 256: left out, 256 tokens are too few: it takes about ")
    least = int(line.rsplit(" ", 1)[1])
    made(book, "bytes", tmp_path / "least", lengths=(least + 8,), kinds=("tracking",))
    record = json.loads((tmp_path / "out" / "needles.json").read_text())
    assert list(record["left_out"]) == ["tracking 256"]
    with pytest.raises(ValueError, match="none is long enough"):
        made(book, "bytes", tmp_path / "none", lengths=(128,))
    assert not (tmp_path / "none").exists()


def test_too_little_text_is_refused(book: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text: it has .* tokens, .* are needed"):
        made(book, "bytes", tmp_path / "out", lengths=(2**20,), kinds=("single",))
    assert not (tmp_path / "out").exists()


def test_a_folder_is_written_once(book: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(book, "bytes", out, lengths=(1024,))
    with folder_unchanged(out):
        assert made(book, "bytes", out, lengths=(1024,)) == [f"{out} has these needles already"]
        with pytest.raises(ValueError, match="holds other needles"):
            made(book, "bytes", out, lengths=(1024,), seed=1)


def test_depths_are_shares_of_tokens() -> None:
    text = "One two. Three four five! “Six.” Seven eight"
    haystack = Haystack(text, byte_tokenizer(), 10**6)
    assert haystack.sentences == ["One two.", "Three four five!", "“Six.”", "Seven eight"]
    lengths = [len(f" {sentence}".encode()) for sentence in haystack.sentences]
    total = sum(lengths)
    assert haystack.depths(0, 4) == [sum(lengths[:i]) / total for i in range(5)]
    assert haystack.take(0, lengths[0] + lengths[1]) == ["One two.", "Three four five!"]
    assert haystack.take(1, lengths[1] + 3) == ["Three four five!"]


def test_scores_are_shares_of_the_answers_found() -> None:
    doc = {"outputs": ["123", "Kal", "77"]}
    assert process_results(doc, ["kal and 1234"]) == {
        "string_match_all": pytest.approx(2 / 3),
        "string_match_part": 1.0,
    }
    assert process_results(doc, ["nothing"])["string_match_part"] == 0.0


def test_the_harness_reads_prompts_of_the_length_counted(
    book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By itself (an include path) and through evaluate, which refuses to cut a prompt."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.tasks import TaskManager

    no_network(monkeypatch)
    out = tmp_path / "out"
    made(book, "bytes", out, lengths=(512,), kinds=("single", "multivalue"), items=2)
    manager = TaskManager(include_defaults=False, include_path=str(out))
    loaded = manager.load(["needles", "needles_choice"])
    assert set(loaded["groups"]) == {"needles", "needles_choice"}
    task: Any = loaded["tasks"]["needles_single_512"]
    choice: Any = loaded["tasks"]["needles_choice_single_512"]
    for doc in task.eval_docs:
        prompt = task.fewshot_context(doc, 0, gen_prefix=doc["gen_prefix"])
        answer = task.config.generation_kwargs["max_gen_toks"]
        assert len(prompt.encode()) + answer == doc["length"]
        context = choice.fewshot_context(doc, 0, gen_prefix=doc["gen_prefix"])
        requests = choice.construct_requests(doc, context, metadata=("", 0, 1))
        assert requests[doc["answer"]].args == (prompt, f" {doc['outputs'][0]}")
    model = bytes_model(tmp_path / "model", length=512)
    results = tmp_path / "results"
    given = ["--device", "cpu", "--batch-size", "2"]
    assert (
        main(["evaluate", str(model), "--tasks", str(out), "--output", str(results), *given]) == 0
    )
    printed = capsys.readouterr().out
    assert "needles, string_match_all in %" in printed and "needles, acc in %" in printed
    assert "were cut" not in printed
    short = bytes_model(tmp_path / "short", length=256)
    named = [str(out / "needles.yaml"), "--output", str(tmp_path / "cut")]
    assert main(["evaluate", str(short), "--tasks", *named, *given]) == 2
    assert "give --max-length 512" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


def test_the_command_takes_a_model_for_its_tokenizer(
    book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = llama(tmp_path / "model"), tmp_path / "out"
    given = [
        "needles",
        "--text",
        book,
        "--lengths",
        "700,900",
        "--kinds",
        "single",
        "--items",
        "1",
    ]
    assert main([*given, "--tokenizer", str(folder), "--output", str(out)]) == 0
    (row,) = items(out / "single_700.jsonl")
    assert row["length"] <= 700
    capsys.readouterr()
    for more, said in (
        (["--tokenizer", "nobody/nothing"], "tokenizer nobody/nothing cannot be loaded"),
        (["--tokenizer", "bytes", "--kinds", "double"], "kinds: expected some of single"),
        (["--tokenizer", "bytes", "--items", "0"], "items: expected at least 1"),
        (["--tokenizer", "bytes", "--text", "nowhere"], "nowhere"),
        (["--tokenizer", "bytes", "--name", "a/b"], "name: expected letters"),
    ):
        assert main([*given, *more, "--output", str(tmp_path / "bad")]) == 2
        printed = capsys.readouterr().err.strip()
        assert said in printed and "\n" not in printed
        assert not (tmp_path / "bad").exists()
