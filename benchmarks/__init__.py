"""The programs that measured what the README and docs/results.md say."""

import sys
from collections.abc import Callable

from jsonargparse import auto_cli

from lab.errors import LabError


def run(main: Callable[..., None], as_positional: bool = True) -> None:
    """Call `main` with what the command line says, dashes in options as good as underscores; what a user can mend is
    one sentence on stderr, and Ctrl-C none.

    Args:
        main: Of a benchmark; ends the process when it fails.
        as_positional: Parameters without default are named by their place, not by an option.
    """
    try:
        auto_cli(main, as_positional=as_positional, args=[underscored(word) for word in sys.argv[1:]])
    except (LabError, OSError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(130)


def underscored(word: str) -> str:
    """`--budget-minutes=5` as jsonargparse has it."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word
