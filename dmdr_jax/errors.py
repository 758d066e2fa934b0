"""The one exception a user is meant to read, and what lies behind others."""

from collections.abc import Iterator


class UserError(Exception):
    """Bad input: the message is one sentence that names the thing and how to mend it.

    Programs print it without a traceback and exit with status 2.
    """


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that led to it, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
