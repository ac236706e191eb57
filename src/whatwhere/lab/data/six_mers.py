"""The 4,107 tokens of the Nucleotide Transformer: DNA six bases at a time.

Ids, as in instadeepai/nucleotide-transformer (Dalla-Torre et al. 2023): 0 to 5 are `<unk>`,
`<pad>`, `<mask>`, `<cls>`, `<eos>`, `<bos>`; then the 4,096 words of six letters in the order
A, T, C, G (AAAAAA is 6, GGGGGG 4101), the letters A, T, C, G alone (4102 to 4105) and N (4106).
From the left, six bases are one token; what is left before an N or the end is one token a base;
each N is one token.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whatwhere.lab.data.extras import need

LENGTH = 6
BASES = "ATCG"
SPECIAL = ("<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>")
PADDING = SPECIAL.index("<pad>")
FIRST_WORD = len(SPECIAL)
FIRST_BASE = FIRST_WORD + len(BASES) ** LENGTH
N = FIRST_BASE + len(BASES)
VOCAB_SIZE = N + 1

AMBIGUOUS = "RYSWKMBDHV"
"""IUPAC's codes for one of several bases, N apart."""

# 0 to 3 a base, 4 N or another ambiguous code, 255 no nucleotide; lower case as upper case.
CODES = np.full(256, 255, dtype=np.uint8)
for _code, _letters in enumerate((*BASES, f"N{AMBIGUOUS}")):
    for _letter in _letters + _letters.lower():
        CODES[ord(_letter)] = _code


def encode(sequence: str) -> NDArray[np.uint16]:
    """Return the tokens of a sequence, `(N,)`, exactly those of `six_mer_tokenizer`.

    Raises:
        ValueError: A character that is no nucleotide code.
    """
    codes = CODES[np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)]
    if codes.size and codes.max() > len(BASES):
        place = int(codes.argmax())
        raise ValueError(f"position {place + 1}: {sequence[place]!r} is no nucleotide code")
    parts: list[NDArray[np.uint16]] = []
    end = 0
    for start, stop in runs(codes):
        parts += [np.full(start - end, N, dtype=np.uint16), encode_run(codes[start:stop])]
        end = stop
    parts.append(np.full(len(codes) - end, N, dtype=np.uint16))
    return np.concatenate(parts)


def runs(codes: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Return start and end of each longest stretch of bases in `(N,)` codes."""
    bases = np.zeros(len(codes) + 2, dtype=bool)
    np.less(codes, len(BASES), out=bases[1:-1])
    edges = np.flatnonzero(bases[1:] != bases[:-1])
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def encode_run(codes: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return the tokens of `(N,)` codes that are all bases: `N // 6` words, `N % 6` letters."""
    words = len(codes) // LENGTH
    tokens = np.empty(words + len(codes) % LENGTH, dtype=np.uint16)
    digits = codes[: words * LENGTH].reshape(words, LENGTH)
    value = digits[:, 0].astype(np.uint16)
    for place in range(1, LENGTH):
        value = value * len(BASES) + digits[:, place]
    tokens[:words] = value + FIRST_WORD
    tokens[words:] = codes[words * LENGTH :].astype(np.uint16) + FIRST_BASE
    return tokens


def decode(tokens: NDArray[np.integer]) -> str:
    """Return the sequence of tokens; special tokens give nothing."""
    words = np.array(vocabulary(), dtype=object)
    words[:FIRST_WORD] = ""
    return "".join(words[np.asarray(tokens, dtype=np.int64)])


@cache
def vocabulary() -> tuple[str, ...]:
    """Return all tokens by id."""
    return (*SPECIAL, *map("".join, product(BASES, repeat=LENGTH)), *BASES, "N")


def six_mer_tokenizer() -> Any:
    """Return a new `tokenizers.Tokenizer`: upper-cases, takes other IUPAC codes as N.

    It gives what `encode` gives, about a hundred times slower.

    Raises:
        ValueError: `tokenizers` is not installed.
    """
    tokenizers = need("tokenizers", "data")
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=SPECIAL[0]))
    replace = tokenizers.normalizers.Replace
    either = f"[{AMBIGUOUS}{AMBIGUOUS.lower()}n]"
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [
            *(replace(base.lower(), base) for base in BASES),
            replace(tokenizers.Regex(either), "N"),
        ]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(f"[{BASES}]{{{LENGTH}}}|."), behavior="isolated"
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
