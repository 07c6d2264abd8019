"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A user's mistake. The message names what is wrong, where, the value, what is allowed and what to do.

    Command-line entry points print it as `error: ...` and exit with code 2, without a traceback.
    """


def show(value: object) -> str:
    """A value as a message quotes it: at most 80 characters, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
