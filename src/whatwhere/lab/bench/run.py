"""A whole measurement: every case that is not in the folder yet, a table, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from whatwhere.lab import storage
from whatwhere.lab.bench import peers, results
from whatwhere.lab.bench.cases import Case
from whatwhere.lab.bench.measure import OUT_OF_MEMORY, measure
from whatwhere.lab.bench.results import Row
from whatwhere.lab.bench.settings import Settings
from whatwhere.lab.bench.sides import competing
from whatwhere.lab.bench.timing import copy_bandwidth

Say = Callable[[str], None]


def run(settings: Settings, say: Say) -> list[Row]:
    """Measure what is asked for and not measured yet; write as it goes along.

    Args:
        settings: What is asked for.
        say: Told of progress, line by line.

    Returns:
        The rows of these settings, old ones included.

    Raises:
        ValueError: If the settings are wrong, or the folder holds something else; nothing was
            measured or written then.
        RunError: If another process works in the folder, or it cannot be written.
    """
    settings.check()
    folder = settings.output
    old = results.read(folder) if folder else []
    if settings.against and settings.what == "step":
        say("peers have no training step of this model: they take no part")
    elif settings.against:
        for line in peers.missing():
            say(line)
    copy = None
    if settings.what == "decode" and settings.where == "cuda":
        copy = copy_bandwidth()
    wanted: list[Row] = []
    with storage.lock(folder) if folder else nullcontext():
        for case in settings.cases():
            rows = _case(case, settings, old, copy, say)
            wanted += rows
            old = results.merge(old, rows)
            if folder:
                results.write(folder, old)
        if folder:
            _draw(folder, old)
    return wanted


def wrong(rows: Sequence[Row]) -> str | None:
    """What is wrong with sides of ours, in one line; ``None`` if nothing is."""
    bad = [
        r
        for r in rows
        if r["origin"] != "peer" and (r["status"] == "wrong" or r["status"].startswith("failed"))
    ]
    if not bad:
        return None
    first = bad[0]
    return (
        f"{len(bad)} of {len(rows)} measurements are wrong and were not timed, first "
        f"{first['encoding']} {first['backend']} ({first['pass']}, length {first['length']}): "
        f"{first['status']}"
    )


def _case(
    case: Case, settings: Settings, old: Sequence[Row], copy: float | None, say: Say
) -> list[Row]:
    """Rows of a case, measured only as far as needed."""
    against = settings.against is not None and case.stage != "step"
    sides = competing(case, settings.encodings, settings.backends, against)
    known = {results.key_of(r): r for r in old}
    keys = {side: results.key(case, side, settings) for side in sides}
    # What went out of memory may have room now.
    done = {
        side: known[k]
        for side, k in keys.items()
        if k in known and known[k]["status"] != OUT_OF_MEMORY
    }
    if len(done) == len(sides):
        say(f"{case}: measured before")
        return list(done.values())
    say(f"{case}")
    # The baseline and the peers run again: a ratio is one of the same rounds.
    again = [s for s in sides if s not in done or s.origin != "ours" or case.stage == "step"]
    found = measure(case, again, settings.count, settings.memory, say)
    made = {o.side: results.row(case, o, settings, copy) for o in found}
    return [done[side] if side in done else made[side] for side in sides]


def _draw(folder: Path, rows: Sequence[Row]) -> None:
    from whatwhere.lab.bench.figure import draw

    draw(rows, folder)
