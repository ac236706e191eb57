"""One case: build its sides, check them, time those that are right, say what the others are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from whatwhere.lab.bench import check, memory
from whatwhere.lab.bench.cases import (
    Case,
    RefusedError,
    Side,
    Tensors,
    Work,
    cache_bytes,
    limit,
    make_tensors,
)
from whatwhere.lab.bench.sides import build
from whatwhere.lab.bench.timing import captured, fastest, first_call, ratios, rounds, synchronise

OK, WRONG, OUT_OF_MEMORY = "ok", "wrong", "out of memory"

_MEMINFO = Path("/proc/meminfo")

# Of a T x S matrix in float32: what is held at once, with softmax and gradients.
_SQUARES = {"forward": 3, "forward+backward": 6, "decode": 3, "step": 6}


@dataclass
class Outcome:
    """What came of a side.

    Attributes:
        side: The side.
        status: `ok`, `wrong`, `out of memory`, or ``refused``, ``skipped``, ``failed`` and why.
        work: It, once it was built.
        error: Largest error against float64.
        first: Seconds of the first call, in which kernels are compiled.
        seconds: Of each round.
        ratio: Median of the ratios to the baseline, round by round.
        least: The least of them.
        to_peer: Median ratio to the fastest peer.
        memory: Peak memory of a call, bytes: what it adds to its inputs, and its cache.
        memory_ratio: The same over that of the baseline.
        baseline: Backend of the baseline.
        limit: See `cases.limit`.
        replayed: Seconds of each round as a CUDA graph.
        graph_ratio: Median of the ratios of these.
    """

    side: Side
    status: str = OK
    work: Work | None = None
    error: float | None = None
    first: float | None = None
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    least: float | None = None
    to_peer: float | None = None
    memory: int | None = None
    memory_ratio: float | None = None
    baseline: str = ""
    limit: float | None = None
    replayed: list[float] = field(default_factory=list)
    graph_ratio: float | None = None

    @property
    def milliseconds(self) -> float | None:
        """Median time."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else None

    @property
    def failed(self) -> bool:
        """Whether one of ours is wrong or broke: no measurement of it would count."""
        broken = self.status == WRONG or self.status.startswith("failed")
        return broken and self.side.origin != "peer"


def measure(
    case: Case, sides: Sequence[Side], count: int, with_memory: bool, say: Callable[[str], None]
) -> list[Outcome]:
    """Check and time the sides of a case in interleaved rounds.

    The baseline is RoPE through that kernel of PyTorch which is fastest in these rounds (for a
    step: RoPE through the first backend).

    Args:
        case: The case.
        sides: What competes.
        count: Rounds.
        with_memory: Whether peak memory is measured too.
        say: Told of every side that was not timed.
    """
    before = torch.get_num_threads()
    if case.threads:
        torch.set_num_threads(case.threads)
    try:
        outcomes = [Outcome(side) for side in sides]
        _prepare(case, outcomes)
        _time(case, outcomes, count)
        if with_memory:
            _weigh(case, outcomes)
    finally:
        torch.set_num_threads(before)
        _empty(case)
    for outcome in outcomes:
        if outcome.status != OK and not outcome.status.startswith("refused"):
            off = "" if outcome.error is None else f" (error {outcome.error:.1e})"
            say(f"  {outcome.side.name}: {outcome.status}{off}")
        if outcome.work is not None:
            outcome.work = Work(lambda: None, **_kept(outcome.work))
    return outcomes


def _kept(work: Work) -> dict[str, Any]:
    """What a row needs of work, without the tensors that it holds."""
    names = ("feature_dim", "cache_numbers", "chosen")
    return {name: getattr(work, name) for name in names}


def _prepare(case: Case, outcomes: Sequence[Outcome]) -> None:
    """Build, check and warm up."""
    if case.device == "cuda":
        torch.compiler.reset()  # every case compiles for its own shape, which has a limit
    tensors = make_tensors(case) if case.stage != "step" else _no_tensors(case)
    right: dict[str, Any] = {}
    for outcome in outcomes:
        work = _attempt(outcome, lambda o=outcome: build(o.side, tensors), case)  # type: ignore[misc]
        if work is None:
            continue
        outcome.work, outcome.limit = work, limit(case, work.feature_dim)
        outcome.status = _too_large(case, work) or OK
        if outcome.status != OK:
            continue

        def checked(o: Outcome = outcome, w: Work = work) -> tuple[float, bool]:
            if w.error is not None:
                return w.error()
            assert w.results is not None
            if o.side.encoding not in right:
                right.clear()  # one at a time: they are large
                right[o.side.encoding] = check.truth(tensors, o.side.encoding)
            start = time.perf_counter()
            found = w.results()
            synchronise(case.device)
            o.first = time.perf_counter() - start
            off = check.error(tensors, found, right[o.side.encoding])
            return off, off <= check.allowed(case, o.side.origin)

        found = _attempt(outcome, checked, case)
        if found is not None:
            outcome.error, good = found
            outcome.status = OK if good else WRONG


def _time(case: Case, outcomes: Sequence[Outcome], count: int) -> None:
    """Fill in seconds and ratios of the sides that are right."""
    for outcome in outcomes:
        if outcome.status == OK and outcome.work is not None:
            run = outcome.work.run
            taken = _attempt(outcome, lambda r=run: first_call(r, case.device), case)  # type: ignore[misc]
            outcome.first = outcome.first or taken
    timed = {o.side.name: o for o in outcomes if o.status == OK and o.work is not None}
    if not timed:
        return
    runs = {name: o.work.run for name, o in timed.items() if o.work is not None}
    try:
        seconds = rounds(runs, count, case.device)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        for outcome in timed.values():
            outcome.status = OUT_OF_MEMORY
        return
    for name, outcome in timed.items():
        outcome.seconds = seconds[name]
    _relate(outcomes, seconds)
    if case.stage == "decode" and case.device == "cuda":
        _replay(case, timed, count)


def _replay(case: Case, timed: Mapping[str, Outcome], count: int) -> None:
    """Time decoding without its launches, as servers run it: on a GPU they take longer than it."""
    graphs = {}
    for name, outcome in timed.items():
        replay = captured(outcome.work.run) if outcome.work is not None else None
        if replay is not None:
            graphs[name] = replay
    seconds = rounds(graphs, count, case.device) if graphs else {}
    base = fastest(seconds, [name for name, o in timed.items() if o.side.origin == "stock"])
    to_base = ratios(seconds, base) if base else {}
    for name, taken in seconds.items():
        timed[name].replayed = taken
        timed[name].graph_ratio = to_base[name][0] if name in to_base else None


def _relate(outcomes: Sequence[Outcome], seconds: dict[str, list[float]]) -> None:
    """Ratios to the baseline and to the fastest peer."""
    base = fastest(seconds, [o.side.name for o in outcomes if o.side.origin == "stock"])
    if base is None:
        base = fastest(seconds, [o.side.name for o in outcomes if o.side.encoding == "rope"][:1])
    peer = fastest(seconds, [o.side.name for o in outcomes if o.side.origin == "peer"])
    to_base = ratios(seconds, base) if base else {}
    to_peer = ratios(seconds, peer) if peer else {}
    for outcome in outcomes:
        name = outcome.side.name
        if name in to_base and base:
            outcome.ratio, outcome.least = to_base[name]
            outcome.baseline = base.partition(" ")[2]
        if name in to_peer:
            outcome.to_peer = to_peer[name][0]


def _weigh(case: Case, outcomes: Sequence[Outcome]) -> None:
    """Fill in peak memory; of decoding with the cache, beside which a step adds little."""
    for outcome in outcomes:
        if outcome.seconds and outcome.work is not None:
            run = outcome.work.run
            if case.device == "cuda":
                outcome.memory = memory.on_gpu(run)
            else:
                outcome.memory = memory.on_cpu(case, outcome.side)
            if outcome.memory is not None:
                outcome.memory += cache_bytes(case, outcome.work) * case.length * case.batch
    base = next(
        (o.memory for o in outcomes if o.ratio == 1.0 and o.side.backend == o.baseline), None
    )
    for outcome in outcomes:
        if base and outcome.memory is not None:
            outcome.memory_ratio = outcome.memory / base


def _attempt(outcome: Outcome, action: Callable[[], Any], case: Case) -> Any:
    """What an action gives, or ``None`` and the reason as the side's status."""
    try:
        return action()
    except RefusedError as error:
        outcome.status = f"refused: {error}"
    except Exception as error:
        # Whatever code of a backend or a peer raises is a finding, not the end of the others.
        if _is_out_of_memory(error):
            outcome.status = OUT_OF_MEMORY
        elif outcome.side.origin == "stock" and "No available kernel" in str(error):
            outcome.status = "refused: no kernel for this call on this device"
        else:
            said = " ".join(str(error).split())[:160]
            outcome.status = f"failed: {type(error).__name__}: {said}"
    outcome.work = None
    _empty(case)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in said or "out of memory" in said
    )


def _too_large(case: Case, work: Work) -> str | None:
    """Why a side that holds ``T x S`` matrices is not even tried."""
    if not work.square:
        return None
    size = 4 * case.batch * case.heads * case.queries * case.length * _SQUARES[case.stage]
    free = _free(case.device)
    if free is None or size <= 0.8 * free:
        return None
    gib = 2**30
    return (
        f"skipped: its T x S matrices need about {size / gib:.0f} GiB, "
        f"{free / gib:.0f} GiB are free"
    )


def _free(device: str) -> int | None:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    if not _MEMINFO.exists():
        return None
    rows = dict(row.split(":") for row in _MEMINFO.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def _empty(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.empty_cache()


def _no_tensors(case: Case) -> Tensors:
    nothing = torch.empty(0)
    return Tensors(case, nothing, nothing, nothing, nothing)
