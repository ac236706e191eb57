"""`whatwhere diagnose`: one command from a model to a page; what is wrong, in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_models
import torch

from whatwhere.cli import main
from whatwhere.lab.diagnose import drawings, memory, parts, running, subjects
from whatwhere.lab.diagnose.settings import Settings

LENGTHS = "48,16,32,16"
"""Unsorted, and one of them twice, which is fine."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of bytes and a text."""
    folder = tmp_path_factory.mktemp("diagnose")
    tiny_models.llama(folder / "one")
    tiny_models.llama(folder / "two", num_hidden_layers=3, tie_word_embeddings=True)
    tiny_models.words(folder / "text.txt", 400)
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures out, which take most of the time."""
    monkeypatch.setattr(drawings, "drawings", lambda _: [])


def command(place: Path, output: Path, *more: str, model: str = "one") -> list[str]:
    text = str(place / "text.txt")
    given = ["diagnose", str(place / model), "--text", text, "--lengths", LENGTHS]
    return [*given, "--output", str(output), "--texts", "2", "--needles", "1", *more]


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a command which fails says."""
    capsys.readouterr()
    assert main(arguments) == code
    # Bars of transformers are off in a process of the command's own, not in one of tests.
    lines = [x for x in capsys.readouterr().err.splitlines() if x.strip() and "%|" not in x]
    assert len(lines) == 1 and lines[0].startswith("whatwhere: ")
    return lines[0]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A diagnosis of two models, with everything."""
    output = place / "whole"
    assert main(command(place, output, "--against", str(place / "two"))) == 0
    return output


def test_every_figure_has_its_files_and_its_numbers(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]+)"', page)
    assert links and all((whole / link).is_file() for link in links)
    figures = re.findall(r'<figure id="([^"]+)">(.*?)</figure>', page, re.DOTALL)
    names = [name for name, _ in figures]
    for name, content in figures:
        assert {f"{name}.png", f"{name}.svg"} <= set(links)
        assert re.search(r'href="[\w-]+\.csv"', content), name
    for wanted in ("geometry", "silhouette_by_head", "sink_by_head", "loss_by_length"):
        assert wanted in names
    for wanted in ("in_distribution", "frequency_usage", "what_where", "retrieval"):
        assert wanted in names
    assert sum(name.startswith("points-") for name in names) == 2
    for path in whole.glob("*.csv"):
        table = pd.read_csv(path)
        assert len(table)
        if not path.stem.startswith("points-") and "model" in table:
            assert set(table["model"]) == {"one", "two"}, path.name
    assert not [path for path in whole.rglob("*") if path.name.endswith(".partial")]


def test_losses_of_all_lengths_are_over_the_same_tokens(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.Tensor] = []
    measure = parts.length_loss

    def look(model: Any, windows: torch.Tensor) -> Any:
        shown.append(windows)
        return measure(model, windows)

    monkeypatch.setattr(parts, "length_loss", look)
    given = Settings(str(place / "one"), (str(place / "text.txt"),), (48, 16, 24), place / "no")
    (one,) = subjects.find(given)
    work = parts.Work(one, given, subjects.read(one, given), 16, torch.device("cpu"))
    table = parts.loss(work)[0]["loss_by_length"]
    assert table["length"].tolist() == [16, 24, 48]
    texts = shown[-1]
    assert len(texts) > 1
    for windows, length in zip(shown, (16, 24, 48), strict=True):
        assert windows.shape[1] == length and torch.equal(windows.reshape(texts.shape), texts)


def test_page_needs_nothing_but_itself(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"<(script|link|iframe|object)\b", page)
    assert "http://" not in page and "https://" not in page
    sources = re.findall(r'(?:src|srcset)="([^"]{0,40})', page)
    assert sources and all(one.startswith("data:image/svg+xml;base64,") for one in sources)
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == page.count("<img ") and all(alts)


def test_words_of_the_page_are_numbers_of_its_tables(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    table = pd.read_csv(whole / "loss_by_length.csv")
    for model in ("one", "two"):
        losses = table[table["model"] == model].set_index("length")["loss"]
        # Trained at 16, as its config says.
        assert f"{losses[16]:.4f} nats per byte at 16 tokens, {losses[48]:.4f} at 48" in page
    geometry = pd.read_csv(whole / "geometry.csv")
    rows = geometry.query("model == 'one' and side == 'key' and stage == 'after'")
    medians = rows.groupby("length")["stable_rank"].median()
    assert f"({medians[16]:.2f} → {medians[48]:.2f}; before the encoding" in page


def test_the_record_says_what_was_measured_with_what(whole: Path) -> None:
    record = json.loads((whole / "record.json").read_text())
    assert record["seed"] == 0 and record["config"]["lengths"] == [48, 16, 32, 16]
    assert record["identity"]["settings"]["lengths"] == [16, 32, 48]
    assert {"torch", "transformers", "whatwhere"} <= record["versions"].keys()
    assert {"device", "git_commit", "started"} <= record.keys()


def test_the_model_is_what_it_was(place: Path, whole: Path) -> None:
    before = tiny_models.contents(place / "one")
    assert whole.exists()
    assert tiny_models.contents(place / "one") == before


def test_finished_parts_are_not_repeated(
    whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(parts, "PARTS", dict.fromkeys(parts.PARTS, fail))
    monkeypatch.setattr(subjects.Subject, "load", fail)
    assert main(command(place, whole, "--against", str(place / "two"))) == 0


def test_a_stopped_diagnosis_goes_on_where_it_stopped(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_figures: None,
) -> None:
    output, measured = tmp_path / "out", []

    def counted(name: str, stopped: bool) -> Any:
        def part(work: parts.Work) -> parts.Result:
            if stopped:
                raise KeyboardInterrupt
            measured.append(name)
            return known[name](work)

        return part

    known = dict(parts.PARTS)
    monkeypatch.setattr(parts, "PARTS", {n: counted(n, n == "cost") for n in known})
    said = failed(command(place, output), capsys, code=130)
    assert "run the same command again" in said
    assert measured == ["trace", "loss", "angles"] and not (output / "report.html").exists()
    monkeypatch.setattr(parts, "PARTS", {n: counted(n, False) for n in known})
    assert main(command(place, output)) == 0
    assert measured == ["trace", "loss", "angles", "cost", "retrieval"]
    assert (output / "report.html").exists()


def test_folders_of_others_are_refused(
    place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny_models.contents(whole)
    assert "another model, text or settings" in failed(command(place, whole, model="two"), capsys)
    assert "needles: 1 -> 3" in failed(command(place, whole, "--needles", "3"), capsys)
    assert tiny_models.contents(whole) == before
    (tmp_path / "mine.txt").write_text("mine")
    assert "not written by this command" in failed(command(place, tmp_path), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def gpt2(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": 40, "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 256}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)


def without_attention(folder: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(folder)


def words_of_ten(folder: Path) -> None:
    tiny_models.llama(folder, vocab_size=10)


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (gpt2, [], "48 is beyond the table of positions of .*, which ends at 40"),
        (without_attention, [], "no attention that can be observed in Mamba"),
        (words_of_ten, ["--tokenizer", "bytes"], "outside the vocabulary of .*, 10: is bytes"),
        (None, ["--lengths", "16,999999"], r"has [\d,]+ tokens for .*, fewer than .* of 999,999"),
        (None, ["--lengths", "1"], "lengths: expected integers of at least 2, got"),
        (None, ["--lengths", "8,x"], "lengths: expected integers"),
        (None, ["--tokenizer", "./nowhere"], "nowhere"),
        (None, ["--text", "nowhere.txt"], "nowhere.txt"),
        (None, ["--dtype", "int3"], "dtype: expected one of auto"),
        (None, ["--device", "abacus"], "device: 'abacus' cannot be used"),
        (None, ["--texts", "0"], "texts: expected at least 1, got 0"),
        (None, ["--layers", "2"], "layers: .* has layers 0 to 1, got 2"),
        (None, ["--heads", "x"], "heads: expected integers"),
        (None, ["--against", "./nowhere/x"], "no folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    make: Any,
    more: list[str],
    said: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(place, tmp_path / "out")
    if make is not None:
        make(tmp_path / "model")
        arguments[1] = str(tmp_path / "model")
    line = failed([*arguments, *more], capsys)
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said_with_the_estimate_before_anything_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(memory, "free", lambda _: 2**20)
    monkeypatch.setattr(subjects.Subject, "load", fail)
    line = failed(command(place, tmp_path / "out"), capsys)
    assert re.search(r"needs about [\d.]+ GiB \(weights [\d.]+, .*\), and 0.00 GiB are free", line)
    assert not (tmp_path / "out").exists()


def test_a_model_that_computes_nan_is_named_by_its_layer(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.llama(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    arguments = command(place, tmp_path / "out")
    arguments[1] = str(tmp_path / "model")
    line = failed(arguments, capsys)
    assert "layer 1" in line or "layers.1" in line
    assert not (tmp_path / "out" / "parts").exists()


def test_two_models_of_one_name_are_told_apart(place: Path, tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "one")
    both = (str(place / "one"), str(tmp_path / "one"))
    found = subjects.find(Settings(both[0], ("x",), (16,), tmp_path, against=both[1:]))
    assert len({one.label for one in found}) == 2


def test_the_tokenizer_of_a_model_is_its_own_or_that_asked_for(tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "m", vocab_size=len(tiny_models.VOCABULARY))
    tiny_models.tokenizer(tmp_path / "m")
    own = Settings(
        str(tmp_path / "m"), (tiny_models.words(tmp_path / "t.txt", 50),), (8,), tmp_path
    )
    (found,) = subjects.find(own)
    assert found.unit == "nats per token" and len(subjects.read(found, own)) >= 50
    (other,) = subjects.find(Settings(str(tmp_path / "m"), ("x",), (8,), tmp_path, "bytes"))
    assert other.unit == "nats per byte"


def test_texts_do_not_overlap(place: Path, tmp_path: Path) -> None:
    settings = Settings(str(place / "one"), (str(place / "text.txt"),), (1000,), tmp_path, texts=9)
    (subject,) = subjects.find(settings)
    tokens = subjects.read(subject, settings)
    assert subjects.count(tokens, settings) == len(tokens) // 1000 < 9


@pytest.mark.parametrize(("layers", "heads"), [((), ()), ((0,), ()), ((), (1,)), ((0, 1), (2,))])
def test_heads_are_chosen_by_the_rule_that_is_said(
    layers: tuple[int, ...], heads: tuple[int, ...], tmp_path: Path
) -> None:
    import diagnosis_frames as made

    frame = made.clusters(layers=2, heads=3)
    worst = (frame["layer"] == 1) & (frame["head"] == 1) & (frame["length"] == made.LENGTHS[-1])
    frame.loc[worst & (frame["stage"] == "after"), "silhouette"] = -1.0
    settings = Settings("m", ("t",), made.LENGTHS, tmp_path, layers=layers, heads=heads)
    chosen, rule = parts.choose(frame, list(made.LENGTHS), made.TRAIN, settings)
    if layers and heads:
        assert chosen == [(0, 2), (1, 2)] and rule == "asked for"
        return
    assert "changes most from 128 to 1,024 tokens" in rule
    assert all((not layers or a in layers) and (not heads or b in heads) for a, b in chosen)
    if not layers:
        assert chosen == [(1, 1)]


def test_the_estimate_grows_with_length_and_knows_eager_attention(tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "m")
    (subject,) = subjects.find(Settings(str(tmp_path / "m"), ("x",), (16,), tmp_path))
    model = subject.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    short, long = (memory.estimate(model, [n], 1, "float32") for n in (2**15, 2**16))
    assert numbers * 4 <= short.weights <= numbers * 4 + 4096  # and its buffers
    assert memory.estimate(model, [1024], 1, "bfloat16").weights == short.weights // 2
    assert long.activations == 2 * short.activations
    model.config._attn_implementation = "eager"
    more = memory.estimate(model, [2**16], 1, "float32").activations - long.activations
    assert more == 4 * 2**32 * 8
    # Short windows are read in batches, which count too.
    model.config._attn_implementation = "sdpa"
    batched = memory.estimate(model, [64], 1, "float32")
    assert batched.activations == short.activations // 2
    assert running.device_of(Settings("m", ("t",), (8,), tmp_path, device="cpu")).type == "cpu"


@pytest.mark.parametrize("ask", ["copy", "needle"])
def test_lengths_without_room_for_a_question_are_left_out_and_said(
    ask: str, place: Path, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("It was said of it there. What stands where, and when? " * 200)
    lengths = (16, 512)
    settings = Settings(str(place / "one"), (str(text),), lengths, tmp_path, ask=ask, needles=1)
    (subject,) = subjects.find(settings)
    tokens = subjects.read(subject, settings)
    if ask == "copy":  # which needs keys that the text has only once
        tokens = torch.randint(256, (2048,), generator=torch.Generator().manual_seed(0)).numpy()
    work = parts.Work(subject, settings, tokens, 16, torch.device("cpu"))
    items, left_out = parts._items(work)
    assert [length for length, _ in left_out] == [16]
    assert {item.length for item in items} == {512} and len(items) == len(parts.DEPTHS)


def test_what_was_left_out_stands_on_the_page(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "one: nothing asked for at 16 tokens" in page
