"""One promotion at a time per registry: to judge against the champion and to move its alias is one critical section.

MLflow has no compare-and-set. A SQLite store is locked by a file beside the database; that lock ends with its process.
Behind a server the registry itself orders the promoters, like a queue with tickets: each creates a version of the
registered model NAME-promotion-lock, the database makes the numbers unique and ascending and never gives one twice, and
the lowest that is left holds the lock. The model stays, without versions. The two do not exclude each other: where
`mlflow server` runs on a SQLite file, promote by its address only.
"""

import contextlib
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator

from mlflow.exceptions import MlflowException

from vismem.errors import UserError
from vismem.locks import lock_folder
from vismem.registry.tracking import Store, create_model_once

LEASE = 180.0  # seconds; a promotion takes a few, so that who holds the lock for longer was killed
POLL = 0.3


@contextlib.contextmanager
def promotion_lock(store: Store) -> Iterator[Callable[[], None]]:
    """Hold the lock, waiting for others first; yields a check to call before the alias is moved.

    The check raises UserError where the lock was lost: this process slept for longer than the lease.
    """
    if store.database:
        with lock_folder(store.database.with_name(f"{store.database.name}.promotion"), patience=LEASE):
            yield lambda: None
        return
    name = f"{store.model}-promotion-lock"
    create_model_once(store, name, "Orders promotions; a version is a promotion that runs now")
    ticket = _draw(store, name)
    try:
        _wait(store, name, ticket)
        yield lambda: _check_held(store, name, ticket)
    finally:
        _give_back(store, name, ticket)


def _draw(store: Store, name: str, attempts: int = 10) -> int:
    """A new ticket. MLflow gives up after three collisions, so that it is asked up to `attempts` times."""
    holder = f"held by {socket.gethostname()}, process {os.getpid()}"
    try:  # MLflow asks for a source; a ticket has no files
        return int(store.client.create_model_version(name, "s3://none/none", description=holder).version)
    except MlflowException as error:
        if "Giving up" not in str(error) or attempts == 1:
            raise
    time.sleep(random.uniform(0, POLL))
    return _draw(store, name, attempts - 1)


def _first(store: Store, name: str) -> int:
    """The lowest ticket; 0 where there is none."""
    return min((int(item.version) for item in store.client.search_model_versions(f"name='{name}'")), default=0)


def _wait(store: Store, name: str, ticket: int) -> None:
    """Return when `ticket` is the lowest. One that stays lowest for the lease, by our own clock, is given back."""
    holder, since = 0, 0.0
    while (first := _first(store, name)) != ticket:
        now = time.monotonic()
        if first == 0 or first > ticket:
            raise UserError(f"the promotion waited for more than {LEASE:.0f} s and lost its turn: run it again")
        if first != holder:
            holder, since = first, now
            print(f"waiting for the promotion that holds {name} version {first}", file=sys.stderr)
        elif now - since > LEASE:
            _give_back(store, name, first)
        time.sleep(POLL)


def _check_held(store: Store, name: str, ticket: int) -> None:
    if _first(store, name) != ticket:
        raise UserError(f"the promotion took more than {LEASE:.0f} s and lost {name}: nothing was moved, run it again")


def _give_back(store: Store, name: str, ticket: int) -> None:
    with contextlib.suppress(MlflowException):  # another has given it back, or the server is gone: the lease ends it
        store.client.delete_model_version(name, str(ticket))
