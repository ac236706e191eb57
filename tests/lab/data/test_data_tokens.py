"""Tokenizers and the cache of their tokens."""

import errno
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whatwhere.lab.data import TextData, TextTask
from whatwhere.lab.data.sources import Document
from whatwhere.lab.data.tokens import default_cache_dir, load_stream, load_tokenizer

SAMPLE = "the cat sat on the mat and the dog sat on the cat; ünï 漢字 🙂\n" * 20


def documents(*texts: str) -> list[Document]:
    return [Document("x", t.encode(), hashlib.sha256(t.encode()).hexdigest()) for t in texts]


def save_tokenizer(folder: Path, vocab_size: int = 300, eos: bool = True) -> str:
    """Train a byte-level BPE on the sample and save it as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"] if eos else [],
        show_progress=False,
    )
    backend.train_from_iterator([SAMPLE], trainer)
    if eos:  # as Llama's tokenizers do: a special token before each text, unless told otherwise
        number = backend.token_to_id("<eos>")
        backend.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", number)]
        )
    special = {"eos_token": "<eos>"} if eos else {}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_bytes_are_the_text_with_byte_0_between(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    stream = load_stream(documents("ab", "ü"), tokenizer, tmp_path)
    assert stream.tokens.tolist() == [97, 98, 0, 0xC3, 0xBC, 0]
    assert stream.bounds.tolist() == [0, 3, 6]
    assert tokenizer.vocab_size == 256
    assert not any(tmp_path.iterdir())  # not worth a cache


def test_pretrained_tokens_decode_to_the_text(saved: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved)
    texts = [SAMPLE, "another", " \n", *(f"document {i}" for i in range(150))]
    stream = load_stream(documents(*texts), tokenizer, tmp_path)
    assert stream.tokens.dtype == np.uint16
    assert stream.tokens.max() < tokenizer.vocab_size
    backend: Any = tokenizer._tokenizer  # type: ignore[attr-defined]
    for i, text in enumerate(texts):
        ids = stream.tokens[stream.bounds[i] : stream.bounds[i + 1]].tolist()
        assert ids[-1] == tokenizer.separator == backend.eos_token_id
        assert backend.decode(ids[:-1]) == text
        assert ids[:-1] == backend(text, add_special_tokens=False)["input_ids"]


def test_without_an_end_token_there_is_no_separator(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "plain", eos=False))
    assert tokenizer.separator is None
    assert tokenizer.padding == 0
    stream = load_stream(documents("the cat", "the mat"), tokenizer, tmp_path)
    alone = load_stream(documents("the cat"), tokenizer, tmp_path)
    assert stream.tokens[: stream.bounds[1]].tolist() == alone.tokens.tolist()


def test_cache_is_used_and_memory_mapped(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(saved)
    first = load_stream(documents(SAMPLE, "b"), tokenizer, tmp_path)
    monkeypatch.setattr(tokenizer, "encode", lambda documents: pytest.fail("tokenised again"))
    again = load_stream(documents(SAMPLE, "b"), tokenizer, tmp_path)
    assert isinstance(again.tokens, np.memmap)
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.bounds, again.bounds)
    assert again.tokens.dtype == first.tokens.dtype


def test_cache_tells_texts_orders_and_tokenizers_apart(saved: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    other = load_tokenizer(save_tokenizer(tmp_path / "other", vocab_size=270))
    tokenizer = load_tokenizer(saved)
    for texts, used in [
        (["the cat", "the dog"], tokenizer),
        (["the dog", "the cat"], tokenizer),
        (["the cat"], tokenizer),
        (["the cat", "the dog"], other),
    ]:
        got = load_stream(documents(*texts), used, cache)
        fresh = load_stream(documents(*texts), used, tmp_path / f"{len(texts)}{used.name[-3:]}")
        assert got.tokens.tolist() == fresh.tokens.tolist()
    assert len(list((cache / "tokens").iterdir())) == 2 * 4


def test_changed_tokenizer_of_the_same_name_is_another(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "tokenizer")
    first = load_tokenizer(name)
    save_tokenizer(tmp_path / "tokenizer", vocab_size=270)
    assert load_tokenizer(name).fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", [b"", b"not an array", b"\x93NUMPY\x01\x00v\x00{'descr"])
def test_damaged_cache_is_made_anew(saved: str, tmp_path: Path, damage: bytes) -> None:
    tokenizer = load_tokenizer(saved)
    first = load_stream(documents(SAMPLE), tokenizer, tmp_path)
    expected = first.tokens.tolist()
    for file in (tmp_path / "tokens").iterdir():
        file.write_bytes(damage)
    assert load_stream(documents(SAMPLE), tokenizer, tmp_path).tokens.tolist() == expected
    again = load_stream(documents(SAMPLE), tokenizer, tmp_path)
    assert isinstance(again.tokens, np.memmap)
    assert again.tokens.tolist() == expected


def test_cache_files_that_do_not_belong_together_are_made_anew(saved: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved)
    first = load_stream(documents(SAMPLE, "b"), tokenizer, tmp_path)
    (file,) = (tmp_path / "tokens").glob("*.bounds.npy")
    for wrong in (first.bounds + 1, first.bounds[1:]):
        np.save(file, wrong)
        again = load_stream(documents(SAMPLE, "b"), tokenizer, tmp_path)
        assert again.bounds.tolist() == first.bounds.tolist()


def test_cut_off_cache_is_made_anew(saved: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved)
    expected = load_stream(documents(SAMPLE), tokenizer, tmp_path).tokens.tolist()
    (file,) = (tmp_path / "tokens").glob("*.tokens.npy")
    file.write_bytes(file.read_bytes()[:-10])
    assert load_stream(documents(SAMPLE), tokenizer, tmp_path).tokens.tolist() == expected


def test_full_disk_costs_the_cache_not_the_run(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: Any, array: Any) -> None:
        stream.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    tokenizer = load_tokenizer(saved)
    with pytest.warns(UserWarning, match=r"could not be cached in .*No space left on device"):
        stream = load_stream(documents(SAMPLE), tokenizer, tmp_path)
    assert len(stream.tokens) > 0
    assert list((tmp_path / "tokens").iterdir()) == []


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "whatwhere"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "whatwhere"


def error_of(name: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokenizer_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "broken"), str(tmp_path / "nowhere")):
        assert f"tokenizer {name!r} could not be loaded" in error_of(name)

    calls = []

    def offline(name: str, **options: Any) -> Any:
        calls.append(options)
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    message = error_of("some/name")
    assert "We couldn't connect to the hub)" in message
    assert "a local folder made by save_pretrained" in message
    # What is on disk is tried first, and code of others is refused without a question.
    refused = {"trust_remote_code": False}
    assert calls == [{"local_files_only": True, **refused}, refused]


def test_missing_transformers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'whatwhere[lab]'" in error_of("gpt2")


def test_task_with_a_tokenizer(saved: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE * 20)
    data = TextData(paths=(str(text),), tokenizer=saved, split="position", length=32)
    task = TextTask(data, cache_dir=tmp_path / "cache")
    assert task.vocab_size == load_tokenizer(saved).vocab_size > 256
    assert 255 < int(task.train_batch(0, 0, 16).input_ids.max()) < task.vocab_size
    described = task.describe()
    again = TextTask(data, cache_dir=tmp_path / "cache").describe()
    assert described == again
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 4
