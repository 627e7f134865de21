"""The ledger of champions: which version is champion, which one it replaced, when, and by which verdict. No MLflow.

A ledger is a list of moves that only grows. A move is made on the ledger that its maker has read, or not at all: see
`vismem.registry.champion`. MLflow's alias `champion` is a view that follows.
"""

import os
import socket
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from vismem.errors import UserError
from vismem.records import Part, Verdict
from vismem.registry.versions import Version

Action = Literal["promote", "rollback", "adopt"]

ENTRY, REVISION = "move", "revision"  # tags of an entry in MLflow: the move as JSON, and the revision that it expects


def ledger_model(model: str) -> str:
    """The registered model whose versions are the ledger of `model`."""
    return f"{model}-ledger"


class Move(Part):
    """One change of the champion. `adopt` took over an alias that was set before there was a ledger."""

    time: str  # UTC, ISO 8601
    by: str  # host and process
    action: Action
    version: str  # the champion from then on
    previous: str | None
    verdict: dict[str, str] | None = None  # of a promotion: what the gate said, by rule
    manifest_sha256: str = ""  # of the version's bundle: of a model made anew, MLflow gives its number again


class Ledger(Part):
    """All moves, oldest first, and what follows from them."""

    moves: tuple[Move, ...] = ()

    @property
    def revision(self) -> int:
        """How many moves were made."""
        return len(self.moves)

    @property
    def champion(self) -> str | None:
        """The champion's number."""
        return self.moves[-1].version if self.moves else None

    @property
    def blocked(self) -> dict[str, str]:
        """The versions that were rolled back from and not promoted since, each with the time of the rollback."""
        found: dict[str, str] = {}
        for move in self.moves:
            found.pop(move.version, None)
            if move.action == "rollback" and move.previous is not None:
                found[move.previous] = move.time
        return found

    @property
    def earlier(self) -> list[str]:
        """The champions that a rollback can return to, nearest first: those before along the promotions."""
        line: list[str] = []
        for move in self.moves:
            if move.action == "rollback":
                while line[-1] != move.version:
                    line.pop()
            else:
                line.append(move.version)
        left = {*self.blocked, self.champion}
        return [version for version in reversed(line) if version not in left]

    def blocked_since(self, version: Version) -> str | None:
        """When that version was rolled back from, where it is blocked; None for another that has its number."""
        return self.blocked.get(version.version) if self.means(version) else None

    def promotion(self, version: str) -> Move | None:
        """The move by which that version became champion last, other than by a rollback."""
        made = (move for move in reversed(self.moves) if move.version == version and move.action != "rollback")
        return next(made, None)

    def means(self, version: Version) -> bool:
        """Whether the moves, as far as they say, tell of that version and not of another that had its number before."""
        moved = next((move.manifest_sha256 for move in reversed(self.moves) if move.version == version.version), "")
        return moved in ("", version.tags.get("manifest_sha256"))

    def own(self, version: Version | None) -> Version | None:
        """The version, where there is one that the moves tell of."""
        return version if version and self.means(version) else None

    def next_move(self, action: Action, version: Version, verdict: Verdict | None = None) -> Move:
        """The move that makes `version` the champion after this ledger's."""
        time, by = datetime.now(UTC).isoformat(), f"{socket.gethostname()}:{os.getpid()}"
        reasons = {rule.name: rule.reason for rule in verdict.rules} if verdict else None
        return Move(
            time=time, by=by, action=action, version=version.version, previous=self.champion, verdict=reasons,
            manifest_sha256=version.tags.get("manifest_sha256", ""),
        )  # fmt: skip


def effective(entries: Iterable[Version]) -> tuple[Move, ...]:
    """The moves that took effect, oldest first, of the entries of a ledger in MLflow.

    MLflow numbers entries without a gap and never gives a number twice. An entry takes effect if its maker had read all
    that took effect before it; the others lost a race. UserError where an entry was deleted.
    """
    found: list[Move] = []
    ordered = sorted(entries, key=lambda item: int(item.version))
    for number, entry in enumerate(ordered, start=1):
        if entry.version != str(number):
            raise UserError(
                f"the ledger of champions has lost its entry {number}, which somebody deleted in MLflow: restore the "
                "database, or delete the ledger's model there to begin anew from the alias 'champion'"
            )
        try:
            if int(entry.tags[REVISION]) == len(found):
                found.append(Move.model_validate_json(entry.tags[ENTRY]))
        except (KeyError, ValueError) as error:  # pydantic's error is a ValueError
            raise UserError(
                f"entry {number} of the ledger of champions cannot be read ({error}): it was edited in MLflow, or "
                "written by another version of VisMem"
            ) from None
    return tuple(found)
