"""The one exception that means: the user can mend this; and how every command tells of it."""

import os
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """A user's mistake. The message names what is wrong, where, the value, what is allowed and what to do."""


def show(value: object) -> str:
    """A value as a message quotes it: at most 80 characters, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def exit_code(
    command: Callable[[], int | None], argv: Sequence[str] = (), usage: str = "", stopped: str = "nothing is written"
) -> int:
    """The code that `command` returns (none: 0), or 0 after `usage` where `argv` asks for --help.

    Told in a line on stderr: 2 for a mistake, the user's (UserError) or the disk's (OSError); 1 where another of many
    ranks made one; 130 for Ctrl-C, with `stopped` where it has no words of its own.
    """
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; a full disk or a missing permission? What was there is whole", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "by peer" not in str(error):  # how a collective ends whose other side is gone
            raise
        print(f"error: rank {os.environ.get('RANK')} stops: another one ended, and says why", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"interrupted: {str(stop) or stopped}", file=sys.stderr)
        return 130
