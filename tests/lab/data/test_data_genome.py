"""Genomes: the 6-mer tokenizer, FASTA files, splits without overlap, damaged files."""

import gzip
import json
import pickle
import re
import tempfile
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from whatwhere.lab.data import extras, genome, six_mers
from whatwhere.lab.data.corpus import TokenDocument
from whatwhere.lab.data.fasta import chromosome, read_fasta
from whatwhere.lab.data.genome import BLOCK, REGION, GenomeCorpus
from whatwhere.lab.data.six_mers import decode, encode, six_mer_tokenizer

pytest.importorskip("Bio")
pytest.importorskip("tokenizers")

TOKENIZER = six_mer_tokenizer()
letters = st.text("ACGT" * 6 + "acgtNnRYSWKMBDHVrk", max_size=200)


@pytest.fixture(scope="module")
def sample(data_dir: Path) -> Path:
    files = sorted((data_dir / "genome").glob("*.fasta"))
    if not files:
        pytest.skip(f"no FASTA file in {data_dir / 'genome'}")
    return files[0]


def write(file: Path, **records: str) -> Path:
    lines = []
    for name, sequence in records.items():
        lines += [f">{name} made up", *re.findall(".{1,60}", sequence)]
    file.write_text("\n".join(lines) + "\n")
    return file


def bases(count: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), count))


def documents(corpus: GenomeCorpus) -> list[TokenDocument]:
    return [document for item in corpus.items() for document in corpus.documents(item)]


def place(document: TokenDocument) -> tuple[str, int, int]:
    record, span = document.name.rsplit(":", 1)
    first, last = span.split("-")
    return record, int(first), int(last)


def splits_by_record(corpus: GenomeCorpus) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for document in documents(corpus):
        found.setdefault(place(document)[0].rpartition(":")[2], set()).add(document.split)
    return found


# The tokenizer


def test_vocabulary_is_the_nucleotide_transformers() -> None:
    known = {"<unk>": 0, "<pad>": 1, "<mask>": 2, "<cls>": 3, "<eos>": 4, "<bos>": 5}
    known |= {"AAAAAA": 6, "AAAAAT": 7, "AAAATA": 10, "TAAAAA": 1030, "GGGGGG": 4101}
    known |= {"A": 4102, "T": 4103, "C": 4104, "G": 4105, "N": 4106}
    vocabulary = TOKENIZER.get_vocab()
    assert len(vocabulary) == 4107 == GenomeCorpus.vocab_size
    assert {token: vocabulary[token] for token in known} == known
    assert [token for token, _ in sorted(vocabulary.items(), key=lambda e: e[1])] == list(
        six_mers.vocabulary()
    )


@given(letters)
def test_both_algorithms_agree(sequence: str) -> None:
    tokens = encode(sequence)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == TOKENIZER.encode(sequence).ids
    upper = re.sub("[RYSWKMBDHV]", "N", sequence.upper())
    assert decode(tokens) == upper
    assert TOKENIZER.decode(tokens.tolist()) == upper


def test_both_algorithms_agree_on_a_chromosome(sample: Path) -> None:
    ((_, sequence),) = read_fasta(sample)
    tokens = encode(sequence)
    assert tokens.tolist() == TOKENIZER.encode(sequence).ids
    assert decode(tokens) == sequence.upper()


def test_words_are_cut_from_the_left_and_stop_at_n() -> None:
    words = [six_mers.vocabulary()[token] for token in encode("AAAAAACCNNGGGGGGG")]
    assert words == ["AAAAAA", "C", "C", "N", "N", "GGGGGG", "G"]


def test_what_is_no_nucleotide_is_named() -> None:
    for bad in "U-*EJ\n1é€":
        with pytest.raises(ValueError, match=r"position 4: .* is no nucleotide code"):
            encode(f"ACG{bad}ACGT")


def test_special_tokens_decode_to_nothing() -> None:
    assert decode(np.array([3, 6, 4, 1, 1])) == "AAAAAA"


def test_saved_tokenizer_is_an_auto_tokenizer(sample: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    GenomeCorpus([sample]).save_tokenizer(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    sequence = bases(100) + "NRacgtac"
    assert again(sequence, add_special_tokens=False)["input_ids"] == encode(sequence).tolist()
    assert again.decode(encode(sequence)) == decode(encode(sequence))
    assert (len(again), again.pad_token_id, again.eos_token_id) == (4107, 1, 4)


@pytest.mark.parametrize(
    ("module", "act"),
    [
        ("Bio", lambda folder: list(read_fasta(write(folder / "a.fa", a="ACGT")))),
        ("tokenizers", lambda folder: six_mer_tokenizer()),
    ],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, act: object
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ValueError, match=rf"needs {module}: pip install 'whatwhere\[data\]'"):
        act(tmp_path)  # type: ignore[operator]


# Documents


@given(st.lists(letters, min_size=1, max_size=4), st.sampled_from([5, 60, 1000]))
def test_documents_are_the_stretches_of_bases(sequences: list[str], width: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.fa"
        lines: list[str] = []
        for i, sequence in enumerate(sequences):
            lines += [f">r{i}", *re.findall(f".{{1,{width}}}", sequence)]
        file.write_text("\n".join(lines))
        corpus = GenomeCorpus([file], "fasta")
        expected = [
            (f"x.fa:r{i}:{match.start() + 1}-{match.end()}", match[0])
            for i, sequence in enumerate(sequences)
            for match in re.finditer("[ACGT]{12,}", sequence.upper())
        ]
        if not any(set(sequence.upper()) & set("ACGT") for sequence in sequences):
            with pytest.raises(ValueError, match="holds no A, C, G or T"):
                documents(corpus)
            return
        found = documents(corpus)
        assert [(d.name, decode(d.tokens)) for d in found] == expected
        assert all(
            d.tokens.tolist() == TOKENIZER.encode(s).ids
            for d, (_, s) in zip(found, expected, strict=True)
        )


def test_real_sample_comes_back(sample: Path) -> None:
    corpus = GenomeCorpus([sample])
    found = documents(corpus)
    ((title, sequence),) = read_fasta(sample)
    covered = np.zeros(len(sequence), dtype=int)
    for document in found:
        record, first, last = place(document)
        assert record == f"{sample.name}:{title.split()[0]}"
        assert decode(document.tokens) == sequence[first - 1 : last].upper()
        covered[first - 1 : last] += 1
    # Every base once, but those in stretches too short; no N.
    is_base = np.array([letter in "ACGTacgt" for letter in sequence])
    assert covered.max() == 1 and not covered[~is_base].any()
    assert (is_base & (covered == 0)).sum() < 12
    assert {document.split for document in found} == {"train", "validation", "test"}
    counts = corpus.describe()["letters"]
    assert counts["N"] == sequence.upper().count("N")
    assert counts["bases"] == is_base.sum()
    assert json.dumps(corpus.describe())


def test_gzip_and_line_ends_change_nothing(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.fa", one=bases(5000), two=bases(700, 1) + "NN" + bases(300, 2))
    packed = tmp_path / "b.fa.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    dos = tmp_path / "c.fa"
    dos.write_bytes(plain.read_bytes().replace(b"\n", b"\r\n"))
    # bgzip writes many members one after the other.
    half = len(plain.read_bytes()) // 2
    members = tmp_path / "d.fna.gz"
    members.write_bytes(
        gzip.compress(plain.read_bytes()[:half]) + gzip.compress(plain.read_bytes()[half:])
    )
    expected = [(d.split, d.tokens.tolist()) for d in documents(GenomeCorpus([plain], "fasta"))]
    for file in (packed, dos, members):
        found = documents(GenomeCorpus([file], "fasta"))
        assert [(d.split, d.tokens.tolist()) for d in found] == expected


def test_codes_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.fa", one=bases(30) + "RYn" + bases(30).lower() + "k")
    corpus = GenomeCorpus([file], "fasta")
    assert corpus.describe()["letters"] == {
        "bases": 60,
        "lower_case": 32,
        "N": 1,
        "ambiguous": 3,
    }
    assert [place(d)[1:] for d in documents(corpus)] == [(1, 30), (34, 63)]


def test_items_in_any_order_and_in_a_worker(tmp_path: Path) -> None:
    write(tmp_path / "a.fa", one=bases(REGION + 10), two=bases(70), three=bases(2 * REGION, 1))
    write(tmp_path / "b.fa", four=bases(100, 2))
    corpus = GenomeCorpus([tmp_path], "fasta")
    items = list(corpus.items())
    assert len({item.key for item in items}) == len(items) > 3
    expected = [[d.tokens.tolist() for d in corpus.documents(item)] for item in items]
    worker = pickle.loads(pickle.dumps(corpus))
    for index in reversed(range(len(items))):
        item = pickle.loads(pickle.dumps(items[index]))
        assert [d.tokens.tolist() for d in worker.documents(item)] == expected[index]
        assert sum(stop - start for *_, start, stop, _ in item.payload) <= REGION


# Splits


@pytest.mark.parametrize(
    ("title", "known"),
    [
        ("chr21", ("21", True)),
        ("21 dna:chromosome chromosome:GRCh38:21:1:46709983:1 REF", ("21", True)),
        ("NC_000021.9 Homo sapiens chromosome 21, GRCh38.p14 Primary Assembly", ("21", True)),
        ("NC_000023.11 Homo sapiens chromosome X, GRCh38.p14 Primary Assembly", ("X", True)),
        ("CM000683.2 Homo sapiens chromosome 21, GRCh38 reference primary assembly", ("21", True)),
        ("chr21_GL383578v2_alt", ("21", False)),
        ("CHR_HSCHR21_2_CTG1_1 dna:chromosome", ("21", False)),
        (
            "NT_187627.1 Homo sapiens chromosome 21 genomic scaffold, alternate locus group",
            ("21", False),
        ),
        ("chrX", ("X", True)),
        ("chrM", ("M", True)),
        ("MT", ("M", True)),
        ("chrUn_KI270302v1", None),
        ("NC_012920.1 Homo sapiens mitochondrion, complete genome", None),
        ("NC_000067.7 Mus musculus strain C57BL/6J", None),
        ("contig_12", None),
        ("", None),
    ],
)
def test_names_of_chromosomes(title: str, known: tuple[str, bool] | None) -> None:
    assert chromosome(title) == known


def test_human_chromosomes_21_and_22_are_held_out(tmp_path: Path) -> None:
    names = [f"chr{i}" for i in (*range(1, 23), "X", "Y", "M")]
    others = ["chr21_GL383578v2_alt", "chrUn_KI270302v1", "chr1_KI270706v1_random"]
    file = write(tmp_path / "a.fa", **{n: bases(50, i) for i, n in enumerate(names + others)})
    found = splits_by_record(GenomeCorpus([file]))
    assert list(found) == names[:-1]
    held_out = {"chr21": {"validation"}, "chr22": {"test"}}
    assert all(splits == held_out.get(name, {"train"}) for name, splits in found.items())
    # Any FASTA keeps all records, alternative sequences with their chromosome.
    every = splits_by_record(GenomeCorpus([file], "fasta"))
    assert list(every) == names + others
    assert every["chr21_GL383578v2_alt"] == {"validation"}
    assert every["chrM"] == {"train"}


def test_two_chromosomes_or_their_scaffolds_are_not_a_genome(tmp_path: Path) -> None:
    for names in (["chr21", "chr22"], ["chr1", "chr21_x_alt", "chr22_x_alt"]):
        file = write(tmp_path / "a.fa", **{n: bases(50, i) for i, n in enumerate(names)})
        corpus = GenomeCorpus([file])
        assert corpus.describe()["choices"]["split by"] == "blocks of 60000 bases"
        assert list(splits_by_record(corpus)) == names


def test_a_chromosome_that_begins_with_n_is_read(tmp_path: Path) -> None:
    begin = "N" * (2 * BLOCK)
    file = write(tmp_path / "a.fa", chr1=begin + bases(50), chr21=bases(50), chr22=bases(50))
    assert splits_by_record(GenomeCorpus([file])) == {
        "chr1": {"train"},
        "chr21": {"validation"},
        "chr22": {"test"},
    }


def test_stretches_of_two_tokens_are_the_shortest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.fa", one=bases(11) + "N" + bases(12) + "N" + bases(13))
    assert [len(d.tokens) for d in documents(GenomeCorpus([file], "fasta"))] == [2, 3]


def test_many_records_are_split_whole(tmp_path: Path) -> None:
    records = {f"contig{i}": bases(100 + i, i) for i in range(100)}
    corpus = GenomeCorpus([write(tmp_path / "a.fa", **records)], "fasta")
    found = splits_by_record(corpus)
    assert Counter(split for (split,) in found.values()) == {
        "train": 90,
        "validation": 5,
        "test": 5,
    }


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 19, 20, 47])
def test_blocks_share_no_base(tmp_path: Path, blocks: int) -> None:
    half = blocks // 2 * BLOCK
    one, two = bases(half + 5, 1), "N" * BLOCK + bases((blocks - blocks // 2) * BLOCK - 7, 2)
    corpus = GenomeCorpus([write(tmp_path / "a.fa", one=one, two=two)], "fasta")
    found = documents(corpus)
    spans: dict[str, list[tuple[int, int]]] = {}
    for document in found:
        record, first, last = place(document)
        spans.setdefault(record, []).append((first, last))
        assert last - first < BLOCK
    for inside in spans.values():
        assert all(before[1] < after[0] for before, after in pairwise(sorted(inside)))
    assert sum(last - first + 1 for inside in spans.values() for first, last in inside) == (
        (half if half else 0) + len(two) - BLOCK
    )
    counts = Counter(document.split for document in found)
    expected = {1: (0, 0), 2: (1, 0), 47: (2, 2)}.get(blocks, (1, 1))
    assert (counts["validation"], counts["test"]) == expected
    assert counts["train"] == blocks - sum(expected)


# Damage


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"ACGT\nACGT\n", "begins with 'ACGT"),
        (b"@read\nACGT\n+\nIIII\n", "begins with '@read"),
        (b"\x00\x01\x02", "is no FASTA file"),
        (b">chr1\nACGT\nAC-T\n", "record 'chr1', position 7: '-' is no nucleotide code"),
        (b">chr1\nACGT\n>p\nMKV\nE", "record 'p', position 4: 'E' is no nucleotide code"),
        (b">r\nACGU\n", "'U' is no nucleotide code"),
        (b">r\nAC\tGT\n", r"position 3: '\\t' is no"),
        (b">r\nAC\xe9\n", "position 3: 'é' is no"),
        (b">r\n" + b"A" * 60_005 + b"!\n", "position 60006: '!'"),
        (b">r\nNNNN\n>s\n", "holds no A, C, G or T"),
        (b">r\nACGT\n>r\nACGT\n", "two records are called 'r'"),
        (gzip.compress(b">r\n" + bases(5000).encode(), mtime=0)[:-20], "damaged or cut short"),
        (b"\x1f\x8bnonsense", "damaged or cut short"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.fa"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(GenomeCorpus([file]).items())
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_content_and_kind(tmp_path: Path) -> None:
    file = write(tmp_path / "x.fa", a=bases(100))
    first = GenomeCorpus([file]).fingerprint()
    assert GenomeCorpus([tmp_path]).fingerprint() == first
    assert GenomeCorpus([file], "fasta").fingerprint() != first
    write(file, a=bases(100, 1))
    assert GenomeCorpus([file]).fingerprint() != first
    other = write(tmp_path / "y.fa", b=bases(100))
    # Stretches are numbered and split in the order of the files.
    turned = GenomeCorpus([other, file]).fingerprint()
    assert turned != GenomeCorpus([file, other]).fingerprint()


def test_sizes_fit_the_papers_sequences() -> None:
    assert BLOCK % (1000 * six_mers.LENGTH) == 0 and REGION % BLOCK == 0
    assert genome.GenomeCorpus.padding == 1 and genome.GenomeCorpus.separator is None


def test_one_record_is_held_at_a_time(tmp_path: Path) -> None:
    def peak(records: int) -> int:
        sequence = "ACGT" * 750_000
        file = write(tmp_path / f"{records}.fa", **{f"r{i}": sequence for i in range(records)})
        del sequence
        corpus = GenomeCorpus([file], "fasta")
        tracemalloc.start()
        for item in corpus.items():
            for _ in corpus.documents(item):
                pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # what is imported and cached
    assert peak(5) < 1.1 * peak(1)
