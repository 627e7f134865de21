"""The champion: the ledger in the MLflow registry, and the alias and tags there that follow it.

The ledger's entries are versions of a model of its own, NAME-ledger. To create one is a single insert whose number the
database makes unique, on a SQLite file as behind a server: all who reach the registry, on whatever machine, share one
ledger without a lock.
"""

import random
import time
from collections.abc import Callable

from mlflow.exceptions import MlflowException

from vismem.errors import UserError
from vismem.registry.ledger import ENTRY, REVISION, Ledger, Move, effective, ledger_model
from vismem.registry.tracking import Store, create_model_once, find_version, versions
from vismem.registry.versions import CHAMPION, Version, unknown_version
from vismem.registry.view import View


def read_ledger(store: Store) -> Ledger:
    """The present ledger. UserError where entries were deleted or edited."""
    return Ledger(moves=effective(versions(store, ledger_model(store.model))))


def append(store: Store, ledger: Ledger, move: Move) -> bool:
    """Add the move unless others came since `ledger` was read; return whether it was added.

    The entry names the revision that it expects, and is void where the ledger had grown.
    """
    name = ledger_model(store.model)
    if not ledger.moves:
        create_model_once(store, name, "The ledger of champions: do not delete its versions")
    _write(store, name, {REVISION: str(ledger.revision), ENTRY: move.model_dump_json()})
    return move in read_ledger(store).moves


def _write(store: Store, name: str, tags: dict[str, str], attempts: int = 10) -> None:
    """MLflow gives up after three collisions of numbers, so that it is asked up to `attempts` times."""
    try:  # MLflow asks for a source; an entry has no files
        store.client.create_model_version(name, "s3://none/none", tags=tags)
    except MlflowException as error:
        if "Giving up" not in str(error) or attempts == 1:
            raise
        time.sleep(random.uniform(0, 0.3))
        _write(store, name, tags, attempts - 1)


def transact(store: Store, decide: Callable[[Ledger], Move | None]) -> Ledger:
    """Make the move that `decide` chooses by the ledger; where another came between, it decides again by that one's.

    Returns the ledger with the move, or the one on which `decide` chose None.
    """
    while (move := decide(ledger := read_ledger(store))) is not None:
        if append(store, ledger, move):
            return Ledger(moves=(*ledger.moves, move))
    return ledger


def read_view(store: Store) -> View:
    """What MLflow's client says of the model."""
    if not (found := versions(store)):
        return View((), {})
    aliases = store.client.get_registered_model(store.model).aliases
    return View(tuple(found), {alias: str(number) for alias, number in aliases.items()})


def mend_view(store: Store) -> Ledger:
    """Make MLflow's alias and tags say what the ledger says, whatever was left half done; return the ledger.

    An alias that was set before there was a ledger is adopted. Who has written looks at the ledger again, so that of
    two the last to write has seen the last move.
    """
    failed: list[tuple[str, ...]] = []
    while True:
        ledger, view = read_ledger(store), read_view(store)
        if not ledger.moves and (adopted := view.find(CHAMPION)) is not None:
            append(store, ledger, ledger.next_move("adopt", adopted))
            continue
        if not (calls := view.edits(ledger)):
            return ledger
        try:
            for call, *given in calls:
                getattr(store.client, call)(store.model, *given)
        except MlflowException:  # another may have made the same edit at the same time
            if calls == failed:
                raise
            failed = calls


def champion_version(store: Store) -> Version | None:
    """The registered version that the ledger names champion, or None before the first. UserError where it was deleted.

    The view is mended first.
    """
    ledger = mend_view(store)
    if ledger.champion is None:
        return None
    version = ledger.own(find_version(store, ledger.champion))
    if version is None:
        raise UserError(
            f"version {ledger.champion} of '{store.model}', the champion, is no longer in {store.uri}: "
            "`vismem models rollback` returns to the one before, `vismem promote` releases another"
        )
    return version


def named_version(store: Store, which: str) -> Version:
    """The version with that number or alias, `champion` by the ledger. UserError where there is none."""
    version = champion_version(store) if which == CHAMPION else find_version(store, which)
    if version is None:
        raise unknown_version(which, store.model, store.uri, versions(store))
    return version
