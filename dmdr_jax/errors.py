"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: the message is one sentence that names the thing and how to mend it.

    Programs print it without a traceback and exit with status 2.
    """
