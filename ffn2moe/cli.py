"""`ffn2moe COMMAND ...`: convert a dense transformer, and use the result. The commands are in `ffn2moe.commands`.

Commands import heavy modules only when they run, so that `--help` answers in 0.2 seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ffn2moe.commands._command import USER_ERROR, Command, print_error
from ffn2moe.table import Table

COMMANDS: Table[Command] = Table("command", package="ffn2moe.commands")
STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return 0 when it is done, 1 when a check failed, 2 after one line about the user's error."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return options.command.run(options)
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        sys.stderr.close()
        return 0
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print_error(error)
        return USER_ERROR
    except ModuleNotFoundError as error:  # the wheel itself needs none of the packages that convert a model
        package = (error.name or "ffn2moe").partition(".")[0]
        if package == "ffn2moe":
            raise
        print_error(f'this command needs {package}, which is not installed: pip install "ffn2moe[convert]"')
        return USER_ERROR
    except KeyboardInterrupt:
        return STOPPED


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ffn2moe", description="Convert a dense transformer into a mixture of experts, and use the result."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.summary, description=_sentence(command.summary))
        command.add_arguments(added)
        added.set_defaults(command=command)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        try:
            COMMANDS.require(arguments[0])
        except ValueError as error:
            parser.error(str(error))
    return parser.parse_args(arguments)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    sys.exit(main())
