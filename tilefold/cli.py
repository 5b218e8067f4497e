"""The command `tilefold`: run, bench, tune, inspect, mask, doctor."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tilefold.commands import bench, doctor, inspect, mask, run, tune
from tilefold.commands.terminal import EXIT_CODES, Failure, Parser
from tilefold.common.check import one_line

COMMANDS = (run, bench, tune, inspect, mask, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return the exit code of the program."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.main(options)
        sys.stdout.flush()
    except Failure as failure:
        return _complain(options.command, failure, 1)
    except (
        ValueError,
        TypeError,
        OverflowError,
        NotImplementedError,
        OSError,
        ImportError,
    ) as error:
        if isinstance(error, BrokenPipeError):
            # The reader has closed the pipe, as `head` does; Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _complain(options.command, error, 2)
    except MemoryError as error:
        return _complain(options.command, f"too little memory: {error}", 2)
    except KeyboardInterrupt:
        return _complain(options.command, "interrupted", 130)
    return code


def parser() -> Parser:
    """All commands and their options."""
    top = Parser(
        prog="tilefold",
        description="Exact attention by kernels compiled at run time.",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return top


def _version() -> str:
    import tilefold

    return f"tilefold {tilefold.__version__}"


def _complain(command: str, message: object, code: int) -> int:
    print(f"tilefold {command}: {one_line(message)}", file=sys.stderr)
    return code
