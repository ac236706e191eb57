"""`whatwhere bench`: what is checked, timed, kept and refused. Times themselves are not tested."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import whatwhere as ww
from whatwhere.attention.call import Backend, Call
from whatwhere.cli import main
from whatwhere.lab.bench import check, measure, memory, results, run, sides, table, timing
from whatwhere.lab.bench.__main__ import parse
from whatwhere.lab.bench.cases import Case, Side, limit, make_tensors
from whatwhere.lab.bench.settings import Settings
from whatwhere.lab.commands import parse as parse_command

TINY = Settings(
    lengths=(24,), batch=(2,), heads=2, head_dim=(8,), rounds=2, memory=False, device="cpu",
    backends=("sdpa",),
)  # fmt: skip
OPTIONS = [
    *("--lengths", "24", "--batch", "2", "--heads", "2", "--head-dim", "8", "--rounds", "2"),
    *("--no-memory", "--device", "cpu"),
]
CASE = Case("forward+backward", 2, 4, 2, 24, 8, "fp32", True, 1, "cpu", 0)
EVERY_STAGE = pytest.mark.parametrize("stage", ["forward", "forward+backward", "decode"])


def silent(line: str) -> None:
    pass


def add_backend(name: str, compute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Backend(run=compute, refuses=lambda call: None)
    monkeypatch.setitem(ww.BACKENDS, name, entry)


def statuses(rows: list[results.Row]) -> dict[str, str]:
    return {f"{r['encoding']} {r['backend']} {r['pass']}": r["status"] for r in rows}


# --- what is computed ---------------------------------------------------------------------------


def test_limits_are_those_of_matrix_products() -> None:
    forward = replace(CASE, stage="forward", head_dim=64)
    assert limit(forward, 64) == 1 and limit(forward, 128) == 1.5
    both = replace(CASE, head_dim=64)
    assert limit(both, 64) == 1 and limit(both, 128) == pytest.approx(11 / 7)
    assert limit(replace(CASE, stage="decode"), 16) == 1
    assert limit(replace(CASE, stage="step"), 16) is None


def test_rounds_alternate_their_order() -> None:
    called: list[str] = []
    ran = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = timing.rounds(ran, 3, "cpu")
    assert "".join(called) == "abccbaabc"
    assert all(len(taken) == 3 for taken in seconds.values())


def test_ratios_are_taken_round_by_round() -> None:
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 3.0, 4.0]}
    assert timing.ratios(seconds, "a") == {"a": (1.0, 1.0), "b": (1.5, 1.0)}
    assert timing.fastest(seconds, ["b", "c"]) == "b" and timing.fastest(seconds, []) is None


@EVERY_STAGE
@pytest.mark.parametrize("encoding", ["pope", "rope", "alibi"])
@pytest.mark.parametrize("rows", [7, 2**20])
def test_truth_in_blocks_is_the_truth(
    rows: int, encoding: str, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_SCORES", rows * 24 * 2)
    tensors = make_tensors(replace(CASE, stage=stage))
    work = sides.build(Side(encoding, "reference", "ours"), tensors)
    assert work.results is not None
    found = work.results()
    assert check.error(tensors, found, check.truth(tensors, encoding)) < 1e-5
    assert ("delta" in found) == (encoding == "pope" and stage == "forward+backward")
    # One wrong row of one head is enough, a missing or infinite result too.
    broken = dict(found)
    broken["out"] = found["out"].clone()
    broken["out"][1, -1, -1] *= 1.5
    right = check.truth(tensors, encoding)
    assert check.error(tensors, broken, right) > 0.05
    broken["out"] = found["out"] * float("nan")
    assert check.error(tensors, broken, right) == float("inf")
    assert check.error(tensors, {}, right) == float("inf")


@EVERY_STAGE
@pytest.mark.parametrize("peer", ["PoPE-pytorch", "x-transformers"])
def test_peers_compute_the_same(peer: str, stage: Any) -> None:
    pytest.importorskip("PoPE_pytorch" if peer == "PoPE-pytorch" else "x_transformers")
    case = replace(CASE, stage=stage, kv_heads=4, head_dim=32)
    outcome = measure.measure(case, [Side("pope", peer, "peer")], 2, False, silent)[0]
    assert outcome.status == "ok" and outcome.to_peer == 1


# The backward pass has the forward pass in it, and each backend is compiled anew for each.
@pytest.mark.parametrize("stage", ["forward+backward", "decode"])
def test_every_backend_is_measured_or_says_why_not(stage: Any) -> None:
    case = replace(CASE, stage=stage)
    names = sides.competing(case, ["pope"], [], False)
    assert {s.backend for s in names if s.origin == "ours"} == set(ww.BACKENDS) - {"reference"}
    for outcome in measure.measure(case, names, 2, False, silent):
        assert outcome.status == "ok" or outcome.status.startswith("refused: "), outcome.side
        assert (outcome.ratio is not None) == (outcome.status == "ok")


def test_decoding_counts_the_bytes_of_its_cache() -> None:
    settings = replace(TINY, what="decode", kv_heads=(1,))
    rows = run.run(settings, silent)
    kept = {(r["encoding"], r["origin"]): r["cache_bytes_per_token"] for r in rows}
    assert kept["rope", "stock"] == kept["rope", "ours"] == str(2 * 8 * 4)
    assert kept["pope", "ours"] == str(3 * 8 * 4)


def test_memory_of_decoding_counts_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "on_cpu", lambda case, side: 100)
    case = replace(CASE, stage="decode")
    wanted = [Side("rope", "flash", "stock"), Side("pope", "sdpa", "ours")]
    base, found = measure.measure(case, wanted, 2, True, silent)
    cache = 2 * 8 * 4 * case.kv_heads * case.length * case.batch
    assert base.memory == 100 + cache and found.memory == 100 + 1.5 * cache


def test_decoding_is_also_replayed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Here a call stands for its graph, and one cannot be captured.
    case = replace(CASE, stage="decode")
    wanted = [Side("rope", "flash", "stock"), *(Side("pope", b, "ours") for b in ("sdpa", "cpu"))]
    outcomes = measure.measure(case, wanted, 2, False, silent)
    taken = iter([lambda: None, None, lambda: None])
    monkeypatch.setattr(measure, "captured", lambda run: next(taken))
    measure._replay(case, {o.side.name: o for o in outcomes}, 3)
    assert [len(o.replayed) for o in outcomes] == [3, 0, 3]
    assert outcomes[0].graph_ratio == 1 and outcomes[1].graph_ratio is None


def test_a_step_is_checked_and_timed() -> None:
    rows = run.run(replace(TINY, what="step", lengths=(8,), backends=()), silent)
    assert statuses(rows) == {"rope auto step": "ok", "pope auto step": "ok"}
    assert all(float(r["error"]) < 1e-5 and float(r["ratio"]) > 0 for r in rows)


def test_peak_memory_is_that_of_the_call() -> None:
    case = replace(CASE, stage="forward", batch=4, heads=4, kv_heads=4, length=512, head_dim=32)
    little = memory.on_cpu(case, Side("rope", "flash", "stock"))
    much = memory.on_cpu(case, Side("pope", "reference", "ours"))
    if little is None or much is None:
        pytest.skip("no peak of a process to be had here")
    square = 4 * 4 * 512 * 512 * 4
    assert little < square < much < 8 * square


# --- what is wrong, too large or missing --------------------------------------------------------


def wrong_output(call: Call) -> torch.Tensor:
    return ww.BACKENDS["reference"].run(call) * 1.001


def wrong_gradient(call: Call) -> torch.Tensor:
    return ww.BACKENDS["reference"].run(replace(call, k=call.k.detach() + 0 * call.k))


def test_a_wrong_side_is_not_timed_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_backend("off", wrong_output, monkeypatch)
    add_backend("no-grad", wrong_gradient, monkeypatch)
    rows = run.run(replace(TINY, backends=("off", "no-grad")), silent)
    found = statuses(rows)
    assert found["pope off forward"] == found["pope off forward+backward"] == "wrong"
    assert found["pope no-grad forward"] == "ok"
    assert found["pope no-grad forward+backward"] == "wrong"
    assert all(bool(r["ratio"]) == (r["status"] == "ok") for r in rows)
    assert main(["bench", *OPTIONS, "--backends", "off"]) == 1
    printed = capsys.readouterr()
    assert "4 of 6 measurements are wrong" in printed.err and "pope off: wrong" in printed.out


def test_one_that_breaks_is_a_finding_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: Call) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    add_backend("broken", fail, monkeypatch)
    rows = run.run(replace(TINY, backends=("broken", "sdpa")), silent)
    assert statuses(rows)["pope broken forward"] == "failed: RuntimeError: no such kernel"
    assert statuses(rows)["pope sdpa forward"] == "ok"
    assert "4 of 10" in (run.wrong(rows) or "")


def test_out_of_memory_is_a_row_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def large(call: Call) -> torch.Tensor:
        calls.append(call)
        raise torch.OutOfMemoryError("CUDA out of memory")

    add_backend("large", large, monkeypatch)
    settings = replace(TINY, backends=("large",), output=tmp_path / "out")
    rows = run.run(settings, silent)
    assert statuses(rows)["pope large forward"] == "out of memory" and run.wrong(rows) is None
    before = len(calls)
    run.run(settings, silent)
    assert len(calls) > before


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_free", lambda device: 1000)
    said: list[str] = []
    rows = run.run(replace(TINY, backends=("reference",)), said.append)
    assert "skipped: its T x S matrices need" in statuses(rows)["pope reference forward"]
    assert any("skipped" in line for line in said) and run.wrong(rows) is None


def test_a_missing_peer_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PoPE_pytorch", None)
    said: list[str] = []
    rows = run.run(replace(TINY, against="peers"), said.append)
    assert "PoPE-pytorch cannot be imported: pip install PoPE-pytorch==0.2.1" in said
    assert statuses(rows)["pope PoPE-pytorch forward"].startswith("refused: not installed")
    assert run.wrong(rows) is None


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, output=tmp_path / "out", lengths=(16, 24))
    first = run.run(settings, silent)
    path = tmp_path / "out" / "bench.csv"
    before = path.read_bytes()
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert written == first and len(first) == 12
    for r in written:
        assert r["torch"] == torch.__version__ and r["date"] and r["seed"] == "0" and r["commit"]
        assert not r["ms"] and not r["peak_mib"], "absolute figures are for a GPU"
    assert (tmp_path / "out" / "forward-d8-h2-b2-fp32-1threads.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "out" / "forward-d8-h2-b2-fp32-1threads.svg").read_text()

    def again(*args: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", again)
        assert run.run(settings, silent) == first
        assert path.read_bytes() == before
        with pytest.raises(AssertionError):
            run.run(replace(settings, rounds=3), silent)
    # Another encoding joins; what was there stays as it was.
    more = run.run(replace(settings, encodings=("pope", "nope")), silent)
    assert len(more) == 16 and all(r in more for r in first)


def test_another_version_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(TINY, output=tmp_path / "out", passes=("forward",))
    first = run.run(settings, silent)
    changed = {**results.where("cpu"), "code": "another"}
    monkeypatch.setattr(results, "where", lambda device: changed)
    second = run.run(settings, silent)
    assert {r["code"] for r in second} == {"another"}
    assert results.read(tmp_path / "out") == first + second


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("mine.txt", "mine"), ("bench.csv", "a,b\n1,2\n")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        assert main(["bench", *OPTIONS, "--output", str(folder)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("whatwhere: output: ") and printed.count("\n") == 1
        assert [p.name for p in folder.iterdir()] == [name]
        assert (folder / name).read_text() == content


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--encodings", "poope"], "unknown 'poope' (did you mean 'pope'?)"),
        (["--backends", "tritn"], "backends: unknown 'tritn'"),
        (["--kv-heads", "3"], "2 heads are no multiple of 3"),
        (["--rounds", "1"], "rounds: expected at least 2"),
        (["--lengths", "0"], "lengths: expected positive"),
        (["--head-dim", "7"], "head-dim: expected even"),
        (["decode", "--calibrate"], "calibrate: measures attention"),
        (["step", "--model", "125m"], "model: unknown '125m'"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *OPTIONS, *options]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_both_command_lines_read_the_same() -> None:
    options = [*OPTIONS, "--against", "peers", "--causal", "--full", "--threads", "1", "2"]
    options += ["--passes", "forward", "--kv-heads", "1", "2", "--dtype", "bf16", "--output", "x"]
    for arguments in ([], ["decode"], options, ["step", "--model", "124m", "--seed", "3"]):
        plain, full = parse(arguments), parse_command(["bench", *arguments])
        assert {k: getattr(full, k) for k in vars(plain)} == vars(plain)


def test_defaults_follow_from_the_device() -> None:
    cpu = Settings(device="cpu").cases()
    assert {(c.batch, c.heads, c.head_dim, c.dtype, c.causal) for c in cpu} == {
        (4, 8, 64, "fp32", True)
    }
    assert {c.length for c in cpu} == {1024, 2048} and Settings(device="cpu").count >= 7
    gpu = Settings(device="cuda").cases()
    assert Settings(device="cuda").count >= 20
    assert all(c.heads * c.head_dim == 2048 and c.dtype == "bf16" for c in gpu)
    assert all(c.batch == max(1, 16384 // c.length) for c in gpu)
    assert {c.length for c in gpu} >= {1000, 1024, 4096, 4097, 16384, 65536}
    assert {c.causal for c in gpu} == {True, False}
    assert {c.heads // c.kv_heads for c in gpu} == {1, 8}
    decode = Settings(what="decode", device="cuda").cases()
    assert {(c.batch, c.length) for c in decode} == {
        (b, n) for b in (1, 8, 64) for n in (8192, 32768, 131072)
    }


def test_tables_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run.run(replace(TINY, backends=("sdpa", "flex"), against="peers"), silent)
    for text in (table.plain(rows), (table.show(rows), capsys.readouterr().out)[1]):
        for word in ("rope flash = 1", "pope sdpa", "limit", "/peer", "causal", "error", "1.57"):
            assert word in text
        assert "pope flex: refused: FlexAttention has no backward pass on a CPU" in text


def test_it_runs_without_the_packages_of_the_command_line(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'pydantic', 'yaml', 'jinja2', 'x_transformers'):\n"
        "    sys.modules[name] = None\n"
        "from whatwhere.lab.bench.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = [*OPTIONS, "--lengths", "16", "24", "--passes", "forward", "--against", "peers"]
    # Backends that are compiled or interpreted have no part in this.
    options += ["--backends", "cpu", "sdpa"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "x-transformers cannot be imported: pip install" in done.stdout
    assert "pope cpu" in done.stdout
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
