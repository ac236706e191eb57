"""Triton's interpreter, a third faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_once_for_each_kernel() -> None:
    """Have the interpreter replace what is in ``triton.language`` once for each kernel.

    It does so anew whenever a kernel calls another function, though nothing has changed since: a
    third of its time. A kernel that starts finds the language as it always did, and leaves it so.
    """
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(function: Callable[..., Any]) -> Any:
        # What is replaced depends on the module of a function alone.
        module = id(function.__globals__)
        if module in done:
            return None
        done.add(module)
        return patch(function)

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        run(self, *args, **kwargs)

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = start
