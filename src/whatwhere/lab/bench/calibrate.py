"""Which backend is fastest where on this device, written into the user's table of choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import whatwhere as ww
from whatwhere.attention import choices
from whatwhere.lab.bench import results
from whatwhere.lab.bench.cases import Case, Side
from whatwhere.lab.bench.measure import OK, Outcome, measure
from whatwhere.lab.bench.settings import Settings
from whatwhere.lab.storage import disk_errors

# Of each an encoding whose scores are as wide: every channel turns, or half of them.
_ENCODINGS = ("pope", "pope-id")


def calibrate(settings: Settings, say: Callable[[str], None]) -> Path:
    """Measure every backend that takes each width, length and pass; save which was fastest.

    Lengths measured are the middles of buckets that meet halfway (geometrically) and together
    cover all lengths. Entries of other devices in the user's file stay, and so do those of this
    device for widths that were not measured.

    Args:
        settings: ``lengths``, ``head_dim``, ``batch``, ``heads``, ``rounds``, ``backends`` and so
            on; encodings are those whose scores are twice and one and a half times as wide as
            their channels.
        say: Told of progress.

    Returns:
        The file.

    Raises:
        ValueError: If the settings are wrong, the user's file is no table of choices, or no
            backend could be measured; the file is as it was.
        RunError: If it cannot be written.
    """
    settings.check()
    old = choices.load(choices.user_file())
    lengths = settings.lengths or _LENGTHS[settings.where]
    settings = replace(settings, lengths=tuple(sorted(set(lengths))), causal=True, full=False)
    entries: list[dict[str, Any]] = []
    cases = settings.cases()
    if len(settings.passes) > 1:
        # One sequence stands for all: how many there are changes what fills the device, not what
        # a kernel reads.
        cases += replace(settings, what="decode", batch=settings.batch or (1,)).cases()
    for case in cases:
        if case.kv_heads != case.heads or case.threads not in (0, settings.threads[0]):
            continue
        say(f"{case}")
        entries += _entries(case, settings, say)
    if not entries:
        raise ValueError("calibrate: no backend could be measured")
    kept = [entry for entry in old if _place(entry) not in {_place(e) for e in entries}]
    with disk_errors(choices.user_file()):
        return choices.save([*_joined(entries), *kept])


_LENGTHS = {"cpu": (256, 1024, 2048), "cuda": (1024, 4096, 16384)}


def _entries(case: Case, settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The choice for each width of scores in a case."""
    names = settings.backends or tuple(n for n in ww.BACKENDS if n != "reference")
    sides = [Side(e, name, "ours") for e in _ENCODINGS for name in names if name != "auto"]
    outcomes = measure(case, sides, settings.count, False, say)
    found = []
    least, most = _bucket(case.length, settings.lengths)
    for encoding in _ENCODINGS:
        able = [o for o in outcomes if o.side.encoding == encoding and o.status == OK]
        if not able:
            continue
        best = min(able, key=_milliseconds)
        assert best.work is not None
        say(f"  {encoding}: {best.side.backend}")
        found.append(
            {
                "device": choices.device_name(case.device),
                "head_dim": case.head_dim,
                "feature_dim": best.work.feature_dim,
                "value_dim": case.head_dim,
                "min_length": least,
                "max_length": most,
                "stage": case.stage,
                "backend": best.side.backend,
                "measured": True,
                "source": _source(case, settings, able),
            }
        )
    return found


def _milliseconds(outcome: Outcome) -> float:
    return outcome.milliseconds or float("inf")


def _source(case: Case, settings: Settings, able: Iterable[Outcome]) -> str:
    where, when = results.where(case.device), results.when()
    others = ", ".join(o.side.backend for o in able)
    return (
        f"whatwhere bench --calibrate, {when['date']}: fastest of {others}; {case}; "
        f"{settings.count} rounds; torch {where['torch']}, triton {where['triton']}, "
        f"whatwhere {where['whatwhere']} ({when['commit'][:12]})"
    )


def _bucket(length: int, lengths: Iterable[int]) -> tuple[int, int | None]:
    """Least and greatest length that a measured one stands for."""
    ranked = sorted(lengths)
    at = ranked.index(length)
    least = 1 if at == 0 else round((ranked[at - 1] * length) ** 0.5) + 1
    most = None if at == len(ranked) - 1 else round((length * ranked[at + 1]) ** 0.5)
    return least, most


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    names = ("device", "head_dim", "feature_dim", "value_dim", "stage")
    return tuple(entry[name] for name in names)


def _joined(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries in order of place and length."""
    return sorted(entries, key=lambda entry: (*map(str, _place(entry)), entry["min_length"]))
