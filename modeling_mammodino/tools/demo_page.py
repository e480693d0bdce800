"""The command `mammodino demo`: the page of the Hub Space on this machine. Research use only."""

import importlib
import sys
from argparse import ArgumentTypeError, Namespace
from importlib.util import find_spec
from pathlib import Path

from .command import add_model_option

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "space" / "app.py"


def add_command(commands) -> None:
    """Add the subcommand `demo`; `commands` is argparse's action of subparsers."""
    parser = commands.add_parser(
        "demo",
        help="open a page to look at mammograms with a checkpoint",
        description="Opens a page on this machine alone: upload a mammogram or a volume, or take a simulated one; see "
        "what the encoder sees, and which patches and images it finds alike. Nothing is stored. Needs a checkout and "
        "the extra `demo`. Research use only.",
    )
    add_model_option(parser)
    parser.add_argument("--port", type=_port, help="(default: the first free one from 7860)")
    parser.add_argument("--open", action="store_true", help="open it in the browser, too")
    parser.set_defaults(run=run)


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ArgumentTypeError(f"{text}: must be from 1 to 65535")
    return int(text)


def run(options: Namespace) -> None:
    if not PAGE.is_file():
        raise FileNotFoundError("mammodino demo: the page is not in the installed package; run it in a checkout")
    if find_spec("gradio") is None:
        raise ImportError("the page needs gradio: pip install -c constraints.txt -e '.[demo]'")
    sys.path.insert(0, str(CHECKOUT))  # the page is above this package, and imports its simulated examples
    importlib.import_module("space.app").serve(
        options.model, server_name="127.0.0.1", server_port=options.port, inbrowser=options.open
    )
