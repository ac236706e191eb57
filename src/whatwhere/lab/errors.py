"""Mistakes of the user, which the command line answers in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from whatwhere.lab.recipes.files import describe_error


class UserError(Exception):
    """A mistake of the user, in one line."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Take errors in what the user gave as the user's: one line, no traceback."""
    try:
        yield
    except ValidationError as error:
        raise UserError(describe_error(error)) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
