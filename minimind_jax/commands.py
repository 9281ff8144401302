"""How a command line is carried out: which command it names, its settings, its function, and how it ends."""

import contextlib
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minimind_jax import __version__, compiled, last_resort, shell, signals
from minimind_jax.config import settings
from minimind_jax.config.fields import first_words
from minimind_jax.errors import UserError

# Flags of every stage that say which of several processes this is, and where `initialize_distributed` looks for them.
PROCESS_FLAGS = {
    "--coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "--num_processes": "JAX_NUM_PROCESSES",
    "--process_id": "JAX_PROCESS_ID",
}


class Command(NamedTuple):
    """The class of its settings, which begins with what the command does; the function that takes them, as
    `module:function` of this package, imported when it is run; whether several processes may run it together; and the
    extra of this package without which it cannot."""

    settings: type
    function: str
    has_processes: bool = False
    extra: str = ""

    def run(self, prog: str, argv: Sequence[str]) -> int:
        """The exit status: what the function returns if that is a number, else 0."""
        words = take_process_flags(argv) if self.has_processes else argv
        config = settings.load_settings(self.settings, words, prog)
        compiled.keep_programs()
        needs = shell.needing(f"{prog} needs packages that are not here", self.extra)
        with needs if self.extra else contextlib.nullcontext():
            function = pkgutil.resolve_name(f"minimind_jax.{self.function}")
        status = function(config)
        return status if isinstance(status, int) else 0


def run_commands(commands: Mapping[str, Command], argv: Sequence[str]) -> int:
    """Runs `minimind ARGUMENTS` and returns the exit status: 0, 2 for what the user can mend, 1 for a bug,
    128 + signal for Ctrl-C (130), SIGTERM (143) and SIGHUP (129)."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show Chinese gets \u4f60, and the run goes on
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return signals.exit_status(lambda: _dispatch(commands, list(argv)))
    except UserError as error:
        print(f"minimind: {shell.with_program(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if words := last_resort.explain(error):
            print(f"minimind: {words}", file=sys.stderr)
            return 2
        last_resort.report_bug()
        return 1


def _dispatch(commands: Mapping[str, Command], argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(commands), end="")
        return 0
    if argv[0] == "--version":
        print(f"minimind {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in commands:
            return commands[name].run(f"minimind {name}", argv[words:])
    raise UserError(_unknown_command(commands, argv))


def _unknown_command(commands: Mapping[str, Command], argv: Sequence[str]) -> str:
    group = [name for name in commands if name.startswith(argv[0] + " ")]
    if group and (len(argv) == 1 or argv[1].startswith("-")):
        return f"{argv[0]} is a group of commands: {', '.join(group)}"
    asked = " ".join(argv[:2]) if group else argv[0]
    return f"unknown command {asked}; did you mean {settings.nearest(asked, commands)}? (minimind --help lists them)"


def overview(commands: Mapping[str, Command]) -> str:
    """The text of `minimind --help`."""
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {first_words(command.settings)}" for name, command in commands.items())
    return f"""minimind: train a small language model from raw text to a model you can chat with
usage: minimind COMMAND [--config FILE] [--key value ...]    minimind COMMAND --help    minimind --version
{lines}
Stages in N processes: --coordinator_address HOST:PORT --num_processes N --process_id 0 ... N-1; traced: --profile
Configs that come with it: {", ".join(settings.config_names())}
"""


def take_process_flags(argv: Sequence[str]) -> list[str]:
    """The arguments without PROCESS_FLAGS, which go into the environment."""
    left, words = [], iter(argv)
    for word in words:
        flag, given, value = word.partition("=")
        if flag not in PROCESS_FLAGS:
            left.append(word)
        elif value := value if given else next(words, ""):
            os.environ[PROCESS_FLAGS[flag]] = value
        else:
            raise UserError(f"{flag} needs a value")
    return left
