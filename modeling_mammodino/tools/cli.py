"""The command `mammodino`: a foundation model for mammography and tomosynthesis. Research use only."""

import logging

from transformers.utils import logging as transformers_logging

from .. import __version__
from .command import CommandParser, command_line
from .convert import add_command as add_convert
from .demo_page import add_command as add_demo
from .embed import add_command as add_embed
from .environment import add_command as add_env
from .publish import add_command as add_push
from .visualize import add_contact_sheet_command as add_contact_sheet
from .visualize import add_inspect_command as add_inspect


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand. Each comes from a module whose `add_command` names the function that runs it."""
    parser = CommandParser(prog="mammodino", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mammodino {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in (add_demo, add_inspect, add_contact_sheet, add_embed, add_convert, add_push, add_env):
        add_command(commands)
    options = parser.parse_args(arguments)
    with command_line(f"mammodino {options.command}"):
        logging.getLogger().setLevel(logging.WARNING)  # of other libraries, warnings only
        logging.getLogger("modeling_mammodino").setLevel(logging.INFO)
        transformers_logging.disable_progress_bar()  # loading weights takes a moment
        options.run(options)


if __name__ == "__main__":
    main()
