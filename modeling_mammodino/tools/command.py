"""What all commands share: logging to the terminal, errors of the user's input as one line without a traceback, the
type of every option that is a path, and the option --model."""

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHIPPED = Path(__file__).parents[2] / "model_cards" / "mammodino-small"  # in a checkout


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


def shipped_model() -> str | None:
    """Return the folder of the encoder that a checkout carries; None in an installed wheel, which has none."""
    return str(SHIPPED) if (SHIPPED / "model.safetensors").is_file() else None


def add_model_option(parser: ArgumentParser, otherwise: str | None = None) -> None:
    """Add --model, whose default is the checkout's own encoder. otherwise: what is taken where there is none; without
    it the option is required there."""
    parser.add_argument(
        "--model",
        type=user_model,
        default=shipped_model(),
        required=shipped_model() is None and otherwise is None,
        help="checkpoint folder or Hub id, with its image processor (default: in a checkout its "
        f"{SHIPPED.parent.name}/{SHIPPED.name}{f', else {otherwise}' if otherwise else ''})",
    )
