"""The one exception type that means "the user can fix this"."""


class UserError(ValueError):
    """Bad input: the message names the value, the limit and what to do.

    Scripts print it as one line without a traceback and exit with status 2.
    """
