"""What all commands share: logging to the terminal, errors of the user's input as one line without a traceback, the
type of every option that is a path, the option --model, and bars of progress."""

import difflib
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm

SHIPPED = Path(__file__).parents[2] / "model_cards" / "mammodino-small"  # in a checkout
HASH_KEY_VARIABLE = "MAMMODINO_HASH_KEY"  # of the environment: the secret that patients are hashed with
LOG_SECONDS = 60  # between two states of a bar in a log file


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """Run a command's body: what it raises about its input ends the process with `program: reason` and exit code 1.

    The reason is one line; only a list of faults, whose lines are indented, keeps its lines.

    Caught are ImportError (a missing extra), OSError, RuntimeError and ValueError (InvalidImageError is one); anything
    else is a fault of ours and keeps its traceback. Ctrl-C is one line, too, and exits with 130, as a shell reports it.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = "\n  ".join(" ".join(part.split()) for part in str(error).split("\n  "))
        sys.exit(f"{program}: {reason}")
    except KeyboardInterrupt as stop:
        print(f"\n{program}: {str(stop) or 'stopped'}", file=sys.stderr)
        sys.exit(130)


class CommandParser(ArgumentParser):
    """An ArgumentParser that says, of an option that it does not have, which one may be meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # else the options are those of a command
            for word in takewhile(lambda word: word != "--", given):
                name = word.partition("=")[0]
                if name.startswith("--") and not any(each.startswith(name) for each in self._option_string_actions):
                    self.error(f"unknown option {name}{did_you_mean(name, self._option_string_actions)}")
        return super().parse_known_args(given, namespace)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the end of a message, empty where nothing known is like the word."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def show_progress(*given: Any, **options: Any) -> tqdm:
    """Return tqdm's bar, which is drawn anew every LOG_SECONDS only where stderr is no terminal, as in a log file."""
    if not sys.stderr.isatty():
        options = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, **options}
    return tqdm(*given, **options)


def user_path(text: str | Path) -> Path:
    """Take a path as a user wrote it, in an option or a recipe: `~` is the home directory, which shells leave as it is
    in --option=~/folder. Raises ValueError where there is no such home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: no such home directory; write the path out") from error


def user_model(text: str) -> str:
    """Take a checkpoint as a user wrote it: a Hub id as it is, a folder as `user_path`; of a pretraining run's folder
    its encoder."""
    text = str(user_path(text)) if text.startswith("~") else text
    encoder = Path(text) / "encoder"
    is_run = (encoder / "config.json").is_file() and not (Path(text) / "config.json").is_file()
    return str(encoder) if is_run else text


def model_folder(text: str) -> Path:
    """Take a folder that holds a model, as `user_model`."""
    return user_path(user_model(text))


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
