"""Word by word, texts have the tokens that they have as a whole."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from whatwhere.lab.data import words
from whatwhere.lab.data.words import GPT_2, GPT_4, QWEN_2, Words, cut, word_pattern

PATTERNS = {"gpt2": GPT_2, "gpt4": GPT_4, "qwen2": QWEN_2}
SAMPLE = (
    "It's the cat's mat, isn't it?  Yes - 1234 times\r\n\r\n  WE'LL see\tthat. ünï 漢字 🙂 x y z\n"
)


def tokenizer(kind: str, text: str = SAMPLE * 3) -> Any:
    """A small byte-level BPE that splits words as one of the known ones does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "gpt2":
        made.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    return made


@pytest.fixture(scope="module", params=list(PATTERNS))
def trained(request: pytest.FixtureRequest) -> Any:
    return tokenizer(request.param)


def ids(made: Any, text: str) -> list[int]:
    found: list[int] = made.encode(text, add_special_tokens=False).ids
    return found


def by_words(made: Any, text: str) -> list[int]:
    pattern = word_pattern(made.to_str())
    assert pattern
    found: list[int] = Words(made, pattern).encode(text).tolist()
    return found


# Letters, endings, blanks of all kinds, what Unicode changed its mind about, what is newer than
# engines may be, and a special token.
ODD = "ab' \n\r\t.,19éIſß½Ⅷ²\u180e\u200b\u0085\xa0\x1c\u2028’“ا漢🙂\u1c89\U0001e6c0"


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.text(alphabet=ODD, max_size=12),
            st.text(max_size=8),
            st.sampled_from(["<|end|>", "<|end", "'re", "'LL", " the mat", "  ", "\r\n\n"]),
        ),
        max_size=8,
    ).map("".join),
    st.integers(1, 8),
)
def test_tokens_by_words_are_the_tokens(text: str, size: int) -> None:
    for made in TRAINED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(words, "PART", size)
            assert "".join(cut(text)) == text
            assert by_words(made, text) == ids(made, text)


def test_long_texts_are_cut(trained: Any) -> None:
    text = SAMPLE * 500
    assert max(map(len, cut(text))) < 3 * words.PART
    assert by_words(trained, text) == ids(trained, text)
    assert list(cut("x" * 10**5)) == ["x" * 10**5]


def test_words_are_forgotten_when_there_are_too_many(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 50)
    text = " ".join(f"word{i % 40} and{i}" for i in range(5000))
    pattern = word_pattern(trained.to_str())
    assert pattern
    made = Words(trained, pattern)
    assert made.encode(text).tolist() == ids(trained, text)
    assert made.encode("").tolist() == []


def test_real_texts(trained: Any, data_dir: Path) -> None:
    for file in ("books/alice_pg11.txt", "wikitext2/wiki.valid.tokens"):
        text = (data_dir / file).read_text(encoding="utf-8")
        assert by_words(trained, text) == ids(trained, text)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(normalizer={"type": "NFC"}),
        lambda t: t.update(pre_tokenizer=None),
        lambda t: t["pre_tokenizer"].update(type="Metaspace"),
        lambda t: t["model"].update(type="Unigram"),
        lambda t: t["model"].update(dropout=0.1),
        lambda t: t["added_tokens"][0].update(content="two words"),
        lambda t: t["added_tokens"][0].update(content="word"),
    ],
)
def test_other_tokenizers_see_whole_texts(change: Any) -> None:
    content = json.loads(tokenizer("gpt2").to_str())
    change(content)
    assert word_pattern(json.dumps(content)) is None


def test_an_unknown_expression_is_left_to_the_tokenizer() -> None:
    content = json.loads(tokenizer("gpt4").to_str())
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = r"\w+ \w+|."
    assert word_pattern(json.dumps(content)) is None


TRAINED = [tokenizer(kind) for kind in PATTERNS]
