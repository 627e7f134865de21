"""`python -m recipes.study`: run the study, or resume it; the report is written at the end. Run in the project's root.

The folder keeps the parameters that it was started with; what is finished there is never made again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.study.claims import Values
from recipes.study.jobs import run_jobs
from recipes.study.plan import Settings, changed, parameters, plan
from recipes.study.report import write_report
from vismem.config import load_config
from vismem.errors import UserError
from vismem.evaluation.arms import resolve_arms
from vismem.files import read_json, write_json
from vismem.locks import lock_folder
from vismem.records import VISMEM
from vismem.services import exit_on_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="parameters (default: %(default)s)")
    parser.add_argument("--profile", help="a profile of deploy/profiles/")
    parser.add_argument("--out", type=Path, help="the study's folder (default: runs/study, or runs/study-PROFILE)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file that gets a copy of the report")
    for name, field in Settings.model_fields.items():
        kind: dict[str, Any] = {"nargs": "+"} if isinstance(field.default, tuple) else {"type": int}
        about = f"{field.description} (default: {field.default})"
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=about, **kind)
    given = parser.parse_args(argv)
    command = f"python -m recipes.study{f' --profile {given.profile}' if given.profile else ''}"
    folder = given.out or Path(f"runs/study-{given.profile}" if given.profile else "runs/study")
    try:
        settings = Settings(**{name: getattr(given, name) for name in Settings.model_fields})
        for arms in ((*settings.arms, *settings.long_arms), settings.transfer_arms, settings.stage_arms):
            resolve_arms(arms)
        if VISMEM not in settings.stage_arms:
            raise UserError(f"--stage-arms: '{VISMEM}' is missing; what it forgets is compared with what others do")
        config = load_config(given.params, given.profile)
        with exit_on_sigterm(), lock_folder(folder) as lock:  # SIGTERM also stops the running steps
            keep_parameters(folder / "parameters.json", parameters(config, settings))
            jobs = plan(config, settings, folder)
            run_jobs(jobs, folder, lock, settings.jobs, Console(stderr=True))
            print(write_report(config, settings, jobs, folder, command, given.write))
    except (UserError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study: stopped", file=sys.stderr)
        return 130
    return 0


def keep_parameters(file: Path, wanted: Values) -> None:
    """Write the parameters of a new study. UserError where it was started with others."""
    if not file.is_file():
        write_json(file, wanted)
    if differing := changed(read_json(file), wanted):
        listed = "; ".join(f"{name} was {before}, is {now}" for name, (before, now) in differing.items())
        raise UserError(f"{file.parent} was started with other parameters ({listed}): name another folder with --out")


if __name__ == "__main__":
    sys.exit(main())
