"""A run's first tasks: its parameters, resolved once, and the look whether it can reach its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismem.config import Config, parse_config, resolve
from vismem.orchestration import journal as notes
from vismem.orchestration.parameters import parameters_of
from vismem.orchestration.results import write_page
from vismem.orchestration.task import launch_fields
from vismem.params_file import render_params

Values = dict[str, Any]


def open_run(
    tasks: Sequence[str],
    profile: str,
    sections: Mapping[str, Any],
    overrides: Mapping[str, Any],
    launch: Mapping[str, Any],
    page: str,
    journal: str = "",
    environment: Sequence[str] = (),
) -> tuple[Values, ...]:
    """The parameters of each of `tasks`, and at the end how training is launched, see `launch_fields`.

    All parameters, with their descriptions, also go to the file `page` as YAML. `environment`: variables that
    `preflight` must find besides those of its section; it also looks at the journal's bucket. UserError where a
    parameter is wrong, see `vismem.config.resolve`.
    """
    with notes.entry(journal, notes.run_of(page), "configure") as entry:
        config = _with_needs(resolve(profile, sections, overrides), environment, journal)
        write_page(page, render_params(config))
        entry.text = f"profile '{profile}'" if profile else "the defaults and what was given"
        return (*(parameters_of(task, config) for task in tasks), launch_fields(**launch))


def look_ahead(parameters: Values, page: str, journal: str = "") -> None:
    """Run the preflight's checks; their table goes to the file `page`. UserError names every check that failed."""
    from vismem.preflight import preflight

    with notes.entry(journal, notes.run_of(page), "preflight") as entry:
        findings = preflight(parse_config(parameters, "parameters of preflight"), Path(page).parent, Path(page))
        entry.text = f"{len(findings)} checks passed"


def _with_needs(config: Config, environment: Sequence[str], journal: str) -> Config:
    wanted = config.preflight
    buckets = (journal.removeprefix("s3://"),) if journal.startswith("s3://") else ()
    more = {
        "environment": tuple(dict.fromkeys((*wanted.environment, *environment))),
        "buckets": tuple(dict.fromkeys((*wanted.buckets, *buckets))),
    }
    return config.model_copy(update={"preflight": wanted.model_copy(update=more)})
