"""What all commands share: logging to the terminal, errors of the user's input as one line without a traceback, and
the type of every option that is a path."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """Run a command's body: what it raises about its input ends the process with `program: reason` and exit code 1.

    The reason is one line; only a list of faults, whose lines are indented, keeps its lines.

    Caught are ImportError (a missing extra), OSError, RuntimeError and ValueError (InvalidImageError is one); anything
    else is a fault of ours and keeps its traceback. Ctrl-C exits with 130, as a shell reports it.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = "\n  ".join(" ".join(part.split()) for part in str(error).split("\n  "))
        sys.exit(f"{program}: {reason}")
    except KeyboardInterrupt:
        sys.exit(130)


def user_path(text: str | Path) -> Path:
    """Take a path as a user wrote it, in an option or a recipe: `~` is the home directory, which shells leave as it is
    in --option=~/folder. Raises ValueError where there is no such home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: no such home directory; write the path out") from error


def user_model(text: str) -> str:
    """Take a checkpoint as a user wrote it: a Hub id as it is, a folder as `user_path`."""
    return str(user_path(text)) if text.startswith("~") else text
