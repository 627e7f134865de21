"""The champion: the ledger in or beside the MLflow registry, and the alias and tags in MLflow that follow it.

By default the ledger is in the registry itself, as versions of the model NAME-ledger. To create one is a single insert
whose number the database makes unique, on a SQLite file as behind a server: all who reach the registry, on whatever
machine, share one ledger. With `registry.ledger` it is an S3 object (`vismem.registry.bucket`).
"""

import random
import time
from collections.abc import Callable
from typing import Protocol

from mlflow.exceptions import MlflowException

from vismem.errors import UserError
from vismem.registry.bucket import BucketPlace
from vismem.registry.ledger import ENTRY, REVISION, Ledger, Move, effective, ledger_model
from vismem.registry.tracking import Store, create_model_once, find_version, versions
from vismem.registry.versions import CHAMPION, Version, unknown_version
from vismem.registry.view import HERE, PLACE, View


class Place(Protocol):
    """Where a ledger is kept."""

    where: str

    def read(self) -> Ledger:
        """The present ledger."""

    def append(self, ledger: Ledger, move: Move) -> bool:
        """Add the move, unless the ledger is no longer `ledger`; return whether it was added."""


class RegistryPlace:
    """The registry itself: each move is a version of a model of its own, and names the revision that it expects."""

    where = HERE

    def __init__(self, store: Store) -> None:
        self._store, self._name = store, ledger_model(store.model)

    def read(self) -> Ledger:
        """The moves that took effect."""
        return Ledger(moves=effective(versions(self._store, self._name)))

    def append(self, ledger: Ledger, move: Move) -> bool:
        """Write the move down behind all others; it took effect if none came between."""
        if not ledger.moves:
            create_model_once(self._store, self._name, "The ledger of champions: do not delete its versions")
        tags = {REVISION: str(ledger.revision), ENTRY: move.model_dump_json()}
        self._write(tags)
        return move in self.read().moves

    def _write(self, tags: dict[str, str], attempts: int = 10) -> None:
        """MLflow gives up after three collisions of numbers, so that it is asked up to `attempts` times."""
        try:  # MLflow asks for a source; an entry has no files
            self._store.client.create_model_version(self._name, "s3://none/none", tags=tags)
        except MlflowException as error:
            if "Giving up" not in str(error) or attempts == 1:
                raise
            time.sleep(random.uniform(0, 0.3))
            self._write(tags, attempts - 1)


def open_place(store: Store) -> Place:
    """Where the parameters say that the ledger is."""
    return BucketPlace(store.config.ledger, store.model) if store.config.ledger else RegistryPlace(store)


def transact(place: Place, decide: Callable[[Ledger], Move | None]) -> Ledger:
    """Make the move that `decide` chooses by the ledger; where another came between, it decides again by that one's.

    Returns the ledger with the move, or the one on which `decide` chose None.
    """
    while (move := decide(ledger := place.read())) is not None:
        if place.append(ledger, move):
            return Ledger(moves=(*ledger.moves, move))
    return ledger


def read_view(store: Store) -> View:
    """What MLflow's client says of the model."""
    if not (found := versions(store)):
        return View((), {}, {})
    model = store.client.get_registered_model(store.model)
    return View(tuple(found), {alias: str(number) for alias, number in model.aliases.items()}, dict(model.tags))


def mend_view(store: Store) -> Ledger:
    """Make MLflow's alias and tags say what the ledger says, whatever was left half done; return the ledger.

    An alias that was set before there was a ledger is adopted. Who has written looks at the ledger again, so that of
    two the last to write has seen the last move. UserError where the model's ledger is elsewhere.
    """
    place = open_place(store)
    while True:
        ledger, view = place.read(), read_view(store)
        if (recorded := view.tags.get(PLACE, place.where)) != place.where:
            raise UserError(
                f"the ledger of '{store.model}' is in {recorded}, but registry.ledger leads to {place.where}: set it "
                f"as it was, or delete the model's tag '{PLACE}' in MLflow to begin there with the alias '{CHAMPION}'"
            )
        if not ledger.moves and (alias := view.aliases.get(CHAMPION)) is not None:
            place.append(ledger, ledger.next_move("adopt", alias))
            continue
        if not (calls := view.edits(ledger, place.where)):
            return ledger
        for call, *given in calls:
            getattr(store.client, call)(store.model, *given)


def champion_version(store: Store) -> Version | None:
    """The registered version that the ledger names champion, or None before the first. UserError where it was deleted.

    The view is mended first.
    """
    ledger = mend_view(store)
    if ledger.champion is None:
        return None
    if (version := find_version(store, ledger.champion)) is None:
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
