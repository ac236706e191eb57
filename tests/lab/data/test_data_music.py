"""MIDI: tokens and back, transposition, pieces kept in one split, damaged files."""

import csv
import json
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from whatwhere.lab.data import extras, music
from whatwhere.lab.data.compositions import group, split_by_piece, title_keys, whole_name
from whatwhere.lab.data.corpus import TokenDocument
from whatwhere.lab.data.music import MidiCorpus, decode, encode, read_midi, remi, transpose

miditok = pytest.importorskip("miditok")
symusic = pytest.importorskip("symusic")

Note = tuple[int, int, int, int]  # start and duration in ticks, pitch, velocity


@pytest.fixture(scope="module")
def midi_dir(data_dir: Path) -> Path:
    folder = data_dir / "midi"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def make(path: Path, *tracks: Sequence[Note], drums: bool = False) -> Path:
    score = symusic.Score(480)
    for notes in tracks:
        track = symusic.Track(program=0, is_drum=drums)
        for start, duration, pitch, velocity in notes:
            track.notes.append(symusic.Note(start, duration, pitch, velocity))
        score.tracks.append(track)
    path.parent.mkdir(parents=True, exist_ok=True)
    score.dump_midi(str(path))
    return path


def melody(*pitches: int) -> list[Note]:
    return [(480 * i, 240, pitch, 64) for i, pitch in enumerate(pitches)]


def notes(score: Any) -> list[dict[str, np.ndarray]]:
    return [track.notes.numpy() for track in score.tracks]


def documents(corpus: MidiCorpus) -> list[TokenDocument]:
    return [document for item in corpus.items() for document in corpus.documents(item)]


def splits(corpus: MidiCorpus) -> dict[str, str]:
    return {item.key: item.payload[1] for item in corpus.items()}


# The tokenizer


def test_vocabulary_is_the_papers_size() -> None:
    vocabulary = remi().vocab
    assert len(vocabulary) == 328 == MidiCorpus.vocab_size
    assert [vocabulary[f"{name}_None"] for name in ("PAD", "BOS", "EOS", "MASK")] == [0, 1, 2, 3]
    pitches = {name: i for name, i in vocabulary.items() if name.startswith("Pitch_")}
    # Semitones in order, nothing between, nothing of the kind outside.
    assert sorted(pitches.values()) == list(range(5, 93))
    assert all(i - 5 == int(name.removeprefix("Pitch_")) - 21 for name, i in pitches.items())


def test_other_tokens_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fewer:
        vocab: dict[str, int] = {"PAD_None": 0}  # noqa: RUF012

    monkeypatch.setattr(miditok, "REMI", lambda config: Fewer)
    remi.cache_clear()
    with pytest.raises(ValueError, match=r"makes other tokens \(1\) than the 328"):
        remi()
    remi.cache_clear()


def test_a_missing_library_is_named(
    midi_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs symusic: pip install 'whatwhere\[data\]'"):
        list(MidiCorpus([midi_dir]).items())


def test_saved_tokenizer_makes_the_same_tokens(midi_dir: Path, tmp_path: Path) -> None:
    corpus = MidiCorpus([midi_dir])
    corpus.save_tokenizer(tmp_path)
    again = miditok.REMI(params=tmp_path / "tokenizer.json")
    score = read_midi(midi_dir / "Maestro_1.mid")
    assert again.vocab == remi().vocab
    assert again.encode(score)[0].ids == remi().encode(score)[0].ids


# Tokens and back


def test_real_files_keep_their_notes(midi_dir: Path) -> None:
    files = sorted(midi_dir.glob("*.mid"))
    assert files
    for file in files:
        score = read_midi(file)
        (tokens,) = encode(score)
        assert (tokens[0], tokens[-1]) == (1, 2) and tokens[1:-1].min() > 3
        assert tokens.max() < 328
        (before,), (after,) = notes(score), notes(decode(tokens))
        assert len(before["pitch"]) == len(after["pitch"])
        assert np.array_equal(np.sort(before["pitch"]), np.sort(after["pitch"]))


def test_tokens_of_decoded_tokens_are_the_same(midi_dir: Path) -> None:
    (tokens,) = encode(read_midi(midi_dir / "Maestro_1.mid"))
    assert np.array_equal(encode(decode(tokens))[0], tokens)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 50_000),
            st.integers(60, 4000),
            st.integers(24, 105),
            st.integers(1, 127),
        ),
        min_size=1,
        max_size=40,
        unique_by=lambda note: (note[0] // 240, note[2]),
    ),
    st.integers(-3, 3),
)
def test_transposed_tokens_are_the_transposed_music(chosen: list[Note], shift: int) -> None:
    score = symusic.Score(480)
    track = symusic.Track()
    for start, duration, pitch, velocity in sorted(chosen):
        track.notes.append(symusic.Note(start, duration, pitch, velocity))
    score.tracks.append(track)
    (tokens,) = encode(score)
    moved = transpose(tokens, shift)
    assert moved.dtype == tokens.dtype
    assert np.array_equal(encode(score.shift_pitch(shift))[0], moved)
    (before,), (after,) = notes(decode(tokens)), notes(decode(moved))
    for name in ("time", "duration", "velocity"):
        assert np.array_equal(before[name], after[name])
    assert np.array_equal(before["pitch"] + shift, after["pitch"])
    assert np.array_equal(transpose(moved, -shift), tokens)


def test_transposition_of_a_real_file(midi_dir: Path) -> None:
    score = read_midi(midi_dir / "Maestro_3.mid")
    (tokens,) = encode(score)
    for shift in range(-3, 4):
        assert np.array_equal(encode(score.shift_pitch(shift))[0], transpose(tokens, shift))


def test_transposition_stays_on_the_keyboard(tmp_path: Path) -> None:
    (tokens,) = encode(read_midi(make(tmp_path / "x.mid", melody(21, 108))))
    assert np.array_equal(transpose(tokens, 0), tokens)
    for shift in (1, -1):
        with pytest.raises(ValueError, match=r"out of 21 \.\. 108"):
            transpose(tokens, shift)


def test_drums_are_not_transposed(tmp_path: Path) -> None:
    (tokens,) = encode(read_midi(make(tmp_path / "x.mid", melody(36, 40), drums=True)))
    assert np.array_equal(transpose(tokens, 3), tokens)


# Which files are one piece


def test_other_spellings_of_a_piece_share_a_key() -> None:
    # Titles as MAESTRO's metadata have them.
    same = [
        ("Frédéric Chopin", "Etude Op. 10 No. 8", "Etude in F Major, Op. 10, No. 8"),
        ("Frédéric Chopin", "12 Etudes, Op. 25", "Complete Etudes, Opus 25"),
        ("Frédéric Chopin", "Ballade No. 2 in F Major", "Ballade No. 2 in F Major, Op. 38"),
        ("Frédéric Chopin", "Ballade 4 Op. 52", "Ballade No. 4 in F minor, Op. 52"),
        ("Frédéric Chopin", "Barcarolle in F#", "Barcarolle in F-sharp Major, Op. 60"),
        ("Frédéric Chopin", "Fantasie in F Minor, Op. 49", "Fantasy in F Minor, Op.49"),
        ("Franz Schubert", "Sonata in G Major, D 894", "Sonata in G Major, D894"),
        # Two numbers for one sonata: the metadata have counted D. 894 on by movements.
        ("Franz Schubert", "Sonata in G Major, D. 895", "Sonata in G Major, D 894"),
    ]
    for composer, first, second in same:
        assert title_keys(composer, first) & title_keys(composer, second), (first, second)
    different = [
        ("Ballade No. 2 in F Major", "Ballade No. 1 in G Minor, Op. 23"),
        ("Etude Op. 10 No. 8", "Etude Op. 25 No. 8"),
        ("Etude Op. 25 No. 1", "Barcarolle, Op. 60"),
        ("Etude Op. 25 No. 1", "Etude No. 25"),
        ("Sonata in A Major", "Sonata in A Minor"),
        ("Sonata in A-flat Major", "Sonata in A Major"),
    ]
    for first, second in different:
        assert not title_keys("x", first) & title_keys("x", second), (first, second)
    assert not title_keys("x", "Sonata, Op. 2") & title_keys("y", "Sonata, Op. 2")


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("a/AUDIO_09_R1_2014_wav--4_cut_no_2.mid", "a/AUDIO_09_R1_2014_wav--4"),
        ("wav--1_cut.mid", "wav--1"),
        ("Sonata - Part 2.midi", "Sonata"),
        ("sonata_mvt3.mid", "sonata"),
        ("haircut.mid", "haircut"),
        ("Maestro_10.mid", "Maestro_10"),
        ("wav--3.midi", "wav--3"),
    ],
)
def test_names_of_parts(name: str, whole: str) -> None:
    assert whole_name(name) == whole


names = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=6),
    st.sets(st.integers(0, 60).map(str), min_size=1, max_size=3),
    min_size=1,
    max_size=60,
)


@given(names, st.randoms())
def test_no_piece_is_in_two_splits(keys: dict[str, set[str]], random: Any) -> None:
    found = split_by_piece(keys)
    assert found.keys() == keys.keys()
    for first in keys:
        for second in keys:
            if keys[first] & keys[second]:
                assert found[first] == found[second]
    groups = group(keys)
    assert sorted(name for names in groups for name in names) == sorted(keys)
    expected = {1: {"train"}, 2: {"train", "validation"}}
    assert set(found.values()) == expected.get(len(groups), {"train", "validation", "test"})
    # The order in which files are found does not matter.
    shuffled = list(keys.items())
    random.shuffle(shuffled)
    assert split_by_piece(dict(shuffled)) == found


def test_groups_are_the_connected_components() -> None:
    keys = {"a": {"1", "2"}, "b": {"2", "3"}, "c": {"3"}, "d": {"4"}, "e": {"5", "4"}, "f": {"6"}}
    assert sorted(group(keys)) == [["a", "b", "c"], ["d", "e"], ["f"]]


def test_single_pieces_split_90_5_5() -> None:
    found = split_by_piece({str(i): {f"key {i}"} for i in range(1276)})
    assert Counter(found.values()) == {"train": 1148, "validation": 64, "test": 64}


def test_a_large_piece_does_not_fill_a_split() -> None:
    # Whichever comes first by hash, the group of 50 fits into no 5 %.
    for salt in range(20):
        keys = {str(i): {f"{salt} {i}" if i >= 50 else f"{salt} large"} for i in range(150)}
        found = split_by_piece(keys)
        assert Counter(found.values()) == {"train": 134, "validation": 8, "test": 8}


# The corpus


def test_sample_of_maestro(midi_dir: Path) -> None:
    corpus = MidiCorpus([midi_dir])
    files = sorted(file.name for file in midi_dir.glob("*.mid"))
    assert [item.key for item in corpus.items()] == files
    found = documents(corpus)
    assert [document.name for document in found] == files
    assert {document.split for document in found} == {"train", "validation", "test"}
    cuts = {split for name, split in splits(corpus).items() if "_cut_no_" in name}
    assert len(cuts) == 1
    about = corpus.describe()
    assert json.dumps(about)
    assert sum(about["files"].values()) == len(files) == about["pieces"] + 2
    assert about["notes_out_of_range"] == 0
    pitched = sum(int(((d.tokens >= 5) & (d.tokens <= 92)).sum()) for d in found)
    assert pitched == about["notes"]


def test_metadata_say_which_piece(tmp_path: Path) -> None:
    # As the archive unpacks: a folder below the one that is named.
    folder = tmp_path / "maestro-v3.0.0"
    rows = []
    for i in range(40):
        make(folder / "2018" / f"{i}.midi", melody(40 + i, 50, 60))
        composer, title = f"Composer {i % 20}", "Sonata in C Major" if i < 20 else "Sonata in C"
        rows.append((composer, title, f"2018/{i}.midi"))
    columns = ("canonical_composer", "canonical_title", "midi_filename")
    with (folder / "maestro-v3.0.0.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([columns, *rows])
    corpus = MidiCorpus([tmp_path])
    found = splits(corpus)
    for i in range(20):
        assert found[f"{folder.name}/2018/{i}.midi"] == found[f"{folder.name}/2018/{i + 20}.midi"]
    assert Counter(found.values()) == {"train": 36, "validation": 2, "test": 2}
    assert corpus.describe()["pieces"] == 20
    # The same table as JSON.
    (folder / "maestro-v3.0.0.csv").unlink()
    table = {
        column: {str(i): row[place] for i, row in enumerate(rows)}
        for place, column in enumerate(columns)
    }
    (folder / "maestro-v3.0.0.json").write_text(json.dumps(table))
    assert splits(MidiCorpus([tmp_path])) == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "maestro-v3.0.0.csv",
            "canonical_composer,split\nA,train\n",
            "midi_filename.* are needed",
        ),
        (
            "maestro-v3.0.0.csv",
            "midi_filename,canonical_composer,canonical_title\na.mid",
            "needed",
        ),
        ("maestro-v3.0.0.csv", "", "names no performance"),
        ("maestro-v3.0.0.json", '{"midi_filename": {"0": "a', "damaged or cut short"),
        ("maestro-v3.0.0.json", "[1]", "are needed of each performance"),
        ("maestro-v3.0.0.json", '{"midi_filename": {"0": "a"}}', "canonical_composer"),
    ],
)
def test_damaged_metadata_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    make(tmp_path / "a.mid", melody(60))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(MidiCorpus([tmp_path]).items())
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_equal_notes_are_one_piece(tmp_path: Path) -> None:
    for i in range(30):
        make(tmp_path / f"{i}.mid", melody(30 + i % 10, 60))
    found = splits(MidiCorpus([tmp_path], "midi"))
    assert set(found.values()) == {"train", "validation", "test"}
    for i in range(10):
        assert len({found[f"{i + more}.mid"] for more in (0, 10, 20)}) == 1


def test_tracks_are_documents(tmp_path: Path) -> None:
    file = make(tmp_path / "x.mid", melody(60, 62), [], melody(40))
    found = documents(MidiCorpus([file], "midi"))
    assert [document.name for document in found] == ["x.mid (track 0)", "x.mid (track 1)"]
    assert [int((d.tokens >= 5).sum() > 0) for d in found] == [1, 1]


def test_folders_are_read_whole_and_other_files_passed_over(tmp_path: Path) -> None:
    make(tmp_path / "b" / "x.MID", melody(60))
    make(tmp_path / "a.midi", melody(61))
    make(tmp_path / ".hidden.mid", melody(62))
    (tmp_path / "readme.txt").write_text("x")
    assert list(splits(MidiCorpus([tmp_path], "midi"))) == ["a.midi", "b/x.MID"]
    with pytest.raises(ValueError, match=r"'x\.MID' is the name of"):
        MidiCorpus([tmp_path / "b", tmp_path / "b" / "x.MID"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no MIDI file \(\.mid, \.midi\)"):
        MidiCorpus([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no such file"):
        MidiCorpus([tmp_path / "nowhere"])


@pytest.mark.parametrize("of_folder", [False, True])
def test_damaged_files_are_named_in_one_line(tmp_path: Path, of_folder: bool) -> None:
    file = make(tmp_path / "x.mid", melody(60, 64, 67), melody(40, 43))
    whole = file.read_bytes()
    damaged = [
        (make(file, []).read_bytes(), "holds no notes"),
        (b"RIFF" + whole, "is no MIDI file"),
        (b"", "is no MIDI file"),
        (whole[:-1], "is cut short: 1 of 2 tracks are whole"),
        (whole[:14], "is cut short: 0 of 2 tracks are whole"),
        (whole.replace(b"\x90", b"\xf5"), "is no whole MIDI file"),
    ]
    for data, message in damaged:
        file.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            list(MidiCorpus([tmp_path if of_folder else file]).items())
        assert str(caught.value).startswith(f"{file}: {message}"), caught.value
        assert "\n" not in str(caught.value)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    file = make(tmp_path / "x.mid", melody(60, 64), melody(40))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.mid: "):
            read_midi(file)


def test_music_no_piano_can_play_is_named(tmp_path: Path) -> None:
    corpus = MidiCorpus([make(tmp_path / "x.mid", melody(5, 120))], "midi")
    assert corpus.describe()["notes_out_of_range"] == 2
    with pytest.raises(ValueError, match=r"x\.mid: holds no note in 21 \.\. 108"):
        documents(corpus)


def test_fingerprint_follows_files_and_metadata(tmp_path: Path) -> None:
    make(tmp_path / "a.mid", melody(60))
    first = MidiCorpus([tmp_path]).fingerprint()
    assert MidiCorpus([tmp_path]).fingerprint() == first
    (tmp_path / "maestro-v3.0.0.csv").write_text("x")
    second = MidiCorpus([tmp_path]).fingerprint()
    make(tmp_path / "a.mid", melody(61))
    third = MidiCorpus([tmp_path]).fingerprint()
    assert len({first, second, third}) == 3
    files = [tmp_path / "a.mid", tmp_path / "b.mid"]
    make(files[1], melody(62))
    # Items are numbered in the order of the files.
    assert MidiCorpus(files).fingerprint() != MidiCorpus(files[::-1]).fingerprint()


def test_it_travels_to_a_worker(tmp_path: Path) -> None:
    corpus = MidiCorpus([make(tmp_path / "a.mid", melody(60, 61))], "midi")
    before = [d.tokens.tolist() for d in documents(corpus)]
    copy = pickle.loads(pickle.dumps(corpus))
    assert [d.tokens.tolist() for d in documents(copy)] == before
    assert (copy.name, copy.separator, copy.padding) == ("midi", 2, 0)
    assert copy.ranges == {"pitch": (5, 92)} == {"pitch": (music.FIRST_PITCH, music.LAST_PITCH)}
