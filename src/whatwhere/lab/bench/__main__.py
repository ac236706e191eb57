"""``python -m whatwhere.lab.bench``: `whatwhere bench` without what its command line needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from whatwhere.lab.bench.run import run, wrong
from whatwhere.lab.bench.settings import Settings
from whatwhere.lab.bench.table import show
from whatwhere.lab.storage import RunError

_KINDS: dict[str, Any] = {"output": Path}
_WHOLE = {"lengths", "batch", "heads", "kv_heads", "head_dim", "threads", "rounds", "seed"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("cpu", "cuda"),
    "against": ("peers",),
    "dtype": ("fp32", "bf16", "fp16"),
    "passes": ("forward", "forward+backward"),
}


def parse(arguments: Sequence[str]) -> Settings:
    """Read options, which are the fields of `Settings`.

    Raises:
        SystemExit: After help, or if they do not parse.
    """
    parser = argparse.ArgumentParser("whatwhere.lab.bench", allow_abbrev=False)
    parser.add_argument(
        "what", nargs="?", default="attention", choices=("attention", "decode", "step")
    )
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        if field.name == "what":
            continue
        if isinstance(field.default, bool):
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=field.default
            )
            continue
        assert field.default is not MISSING
        kind = int if field.name in _WHOLE else _KINDS.get(field.name, str)
        parser.add_argument(
            option,
            type=kind,
            default=field.default,
            choices=_CHOICES.get(field.name),
            nargs="+" if isinstance(field.default, tuple) else None,
        )
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return Settings(**options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 if all went well, 1 if something is wrong, 2 if the options are."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if settings.calibrate:
            from whatwhere.lab.bench.calibrate import calibrate

            print(calibrate(settings, print))
            return 0
        rows = run(settings, lambda line: print(line, flush=True))
    except ValueError as error:
        return _say(str(error), 2)
    except RunError as error:
        return _say(str(error), 1)
    show(rows)
    said = wrong(rows)
    return _say(said, 1) if said else 0


def _say(message: str, code: int) -> int:
    print(f"whatwhere: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
