"""Chorales, MIDI and genomes from raw files to shards."""

import json
from pathlib import Path

import numpy as np
import pytest

from whatwhere.lab.data.catalogue import make_corpus
from whatwhere.lab.data.corpus import Corpus, CorpusSplit
from whatwhere.lab.data.prepare import prepare

SPLITS: tuple[CorpusSplit, ...] = ("train", "validation", "test")


def raw(name: str, folder: Path) -> Path:
    random = np.random.default_rng(0)
    if name == "jsb":
        pieces = random.integers(40, 70, (12, 30, 4)).tolist()
        content = {"train": pieces[:8], "valid": [*pieces[8:10], []], "test": pieces[10:]}
        (folder / "mine.json").write_text(json.dumps(content))
    elif name == "midi":
        symusic = pytest.importorskip("symusic")
        for i in range(12):
            track = symusic.Track()
            for start, pitch in enumerate(random.integers(30, 100, 50).tolist()):
                track.notes.append(symusic.Note(240 * start, 200, pitch, 64))
            score = symusic.Score(480)
            score.tracks.append(track)
            score.dump_midi(str(folder / f"{i}.mid"))
    else:
        sequence = "".join(random.choice(list("ACGTacgtN"), 3_000_000, p=[0.1249] * 8 + [0.0008]))
        (folder / "a.fa").write_text(f">one\n{sequence}\n>two\n{sequence[:500]}\n")
    return folder


@pytest.mark.parametrize("name", ["jsb", "midi", "fasta"])
def test_shards_hold_the_documents(name: str, tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    corpus: Corpus = make_corpus(name, [raw(name, source)])
    made = prepare(corpus, tmp_path / "out", 2)
    documents = [document for item in corpus.items() for document in corpus.documents(item)]
    for split in SPLITS:
        expected = [document.tokens for document in documents if document.split == split]
        assert expected
        stream = made.stream(split)
        assert np.diff(stream.bounds).tolist() == list(map(len, expected))
        assert np.array_equal(np.concatenate(list(stream.blocks())), np.concatenate(expected))
    again = make_corpus(name, [source])
    assert prepare(again, tmp_path / "other", 1).manifest.splits == made.manifest.splits
    assert made.manifest.source == str(source if name != "jsb" else source / "mine.json")
    left_out = {"jsb": {"piece without a step": 1}, "midi": {}}
    assert made.manifest.left_out == left_out.get(name, made.manifest.left_out)
    assert name != "fasta" or list(made.manifest.left_out) == ["stretch below 12 bases"]
