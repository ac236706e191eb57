"""Cut texts have the tokens of whole ones."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from whatwhere.lab.data import cutting
from whatwhere.lab.data.cutting import can_cut, cut

GPT_4 = next(pattern for pattern in cutting._KNOWN if "{1,3}" in pattern)
SAMPLE = (
    "It's the cat's mat, isn't it?  Yes - 1234 times\r\n\r\n  WE'LL see\tthat. ünï 漢字 🙂 x y z\n"
)


def tokenizer(kind: str, text: str = SAMPLE * 3) -> Any:
    """A small byte-level BPE that splits words as GPT-2's or GPT-4's and Llama 3's."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "gpt2":
        made.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Split(Regex(GPT_4), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    return made


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def trained(request: pytest.FixtureRequest) -> Any:
    return tokenizer(request.param)


def ids(made: Any, text: str) -> list[int]:
    found: list[int] = made.encode(text, add_special_tokens=False).ids
    return found


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="ab' \n\t.,1éI<|end>", max_size=60), st.integers(1, 8))
def test_tokens_of_parts_are_the_tokens(text: str, size: int) -> None:
    for made in TRAINED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cutting, "PART", size)
            parts = list(cut(text))
        assert "".join(parts) == text
        assert [i for part in parts for i in ids(made, part)] == ids(made, text)


def test_long_texts_are_cut(trained: Any) -> None:
    assert can_cut(trained.to_str())
    text = SAMPLE * 500
    parts = list(cut(text))
    assert max(map(len, parts)) < 3 * cutting.PART
    assert [i for part in parts for i in ids(trained, part)] == ids(trained, text)
    assert list(cut("x" * 10**5)) == ["x" * 10**5]


def test_real_books(trained: Any, data_dir: Path) -> None:
    text = (data_dir / "books" / "alice_pg11.txt").read_text(encoding="utf-8")
    parts = list(cut(text))
    assert len(parts) > 20
    assert [i for part in parts for i in ids(trained, part)] == ids(trained, text)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(normalizer={"type": "NFC"}),
        lambda t: t.update(pre_tokenizer=None),
        lambda t: t["pre_tokenizer"].update(type="Metaspace"),
        lambda t: t["model"].update(type="Unigram"),
        lambda t: t["added_tokens"][0].update(content="two words"),
        lambda t: t["added_tokens"][0].update(content="word"),
    ],
)
def test_other_tokenizers_see_whole_texts(change: Any) -> None:
    content = json.loads(tokenizer("gpt2").to_str())
    change(content)
    assert not can_cut(json.dumps(content))


def test_an_unknown_expression_is_not_cut() -> None:
    content = json.loads(tokenizer("gpt4").to_str())
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = r"\w+ \w+|."
    assert not can_cut(json.dumps(content))


TRAINED = [tokenizer("gpt2"), tokenizer("gpt4")]
