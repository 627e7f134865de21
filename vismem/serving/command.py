"""What the commands that run inside a cluster's pods share: the parameters they read, and how they end."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vismem.config import Config, load_config, resolve
from vismem.errors import UserError

PROFILE_VARIABLE = "VISMEM_PROFILE"


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    action: Callable[[Config, argparse.Namespace], str],
) -> int:
    """Parse with --params and --profile added, print the line that `action` returns; 0, or 1 after a UserError."""
    parser.add_argument("--params", type=Path, help="parameter file; default: the parameters' defaults")
    parser.add_argument(
        "--profile",
        default=os.environ.get(PROFILE_VARIABLE) or None,
        help=f"a profile of deploy/profiles/; default: {PROFILE_VARIABLE}",
    )
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.params, options.profile) if options.params else resolve(options.profile or "")
        print(action(config, options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
