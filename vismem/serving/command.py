"""What the commands that run inside a cluster's pods share: the parameters they read, and how they end."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vismem.config import load_config, resolve
from vismem.errors import UserError
from vismem.runtime.access import pass_proxies

PROFILE_VARIABLE = "VISMEM_PROFILE"


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, action: Callable[..., str]) -> int:
    """Print the line that `action(config, **options)` returns; 0, or 1 after a UserError or an OSError.

    The configuration is that of --params and --profile, which are added to the parser's options.
    """
    parser.add_argument("--params", type=Path, help="parameter file; default: the parameters' defaults")
    parser.add_argument("--profile", help=f"a profile of deploy/profiles/; default: {PROFILE_VARIABLE}")
    options = vars(parser.parse_args(arguments))
    pass_proxies()
    params, profile = options.pop("params"), options.pop("profile") or os.environ.get(PROFILE_VARIABLE) or None
    try:
        print(action(load_config(params, profile) if params else resolve(profile or ""), **options))
    except (UserError, OSError) as error:  # OSError: of a volume that belongs to another user, or is full
        print(error, file=sys.stderr)
        return 1
    return 0
