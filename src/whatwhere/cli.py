"""The command line: `whatwhere recipes | data | compare | train | plan | evaluate | extrapolate |
diagnose | needles | report | results | bench | convert | finetune`.

A mistake of the user is one line on standard error and exit code 2; something from outside that
stopped the work (a full disk, another process in the folder) is one line and exit code 1; Ctrl-C
is one line and 130. Anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

USER_ERROR, OUTSIDE_ERROR, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; `sys.argv` by default.

    Returns:
        The exit code.

    Raises:
        SystemExit: After help, or with code 2 after options that do not parse.
    """
    # The bars of transformers for reading and writing weights say nothing that ours do not.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Errors of options are for the user, whom pydantic's pages for developers do not help.
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from whatwhere.lab import commands, errors, storage
    except ModuleNotFoundError as error:
        return _say(
            f"the command line needs {error.name}: pip install 'whatwhere[lab]'", OUTSIDE_ERROR
        )
    except KeyboardInterrupt:
        return _say("stopped", INTERRUPTED)
    before, warnings.showwarning = warnings.showwarning, _show_warning
    threads, threading.excepthook = threading.excepthook, _show_thread_error
    try:
        commands.parse(given).run()
    except errors.UserError as error:
        return _say(str(error), USER_ERROR)
    except storage.RunError as error:
        stopped = type(error).__name__ == "Interrupted"
        return _say(str(error), INTERRUPTED if stopped else OUTSIDE_ERROR)
    except KeyboardInterrupt:
        return _say("stopped: run the same command again to go on", INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) is gone; Python would complain again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTSIDE_ERROR
    finally:
        warnings.showwarning, threading.excepthook = before, threads
    return 0


def _say(message: str, code: int) -> int:
    if code == INTERRUPTED and os.environ.get("RANK", "0") != "0":
        return code  # the signal reaches all processes, of which the first one speaks
    print(f"whatwhere: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any
) -> None:
    print(f"whatwhere: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _show_thread_error(raised: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread meets a full disk before ours does, which then says so in one line.
    if not (isinstance(raised.exc_value, OSError) and raised.exc_value.errno == errno.ENOSPC):
        threading.__excepthook__(raised)


if __name__ == "__main__":
    sys.exit(main())
