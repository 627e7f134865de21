"""What MLflow shows of a model, and what must change there for it to say what the ledger says. No MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass

from vismem.registry.ledger import Ledger
from vismem.registry.versions import CHAMPION, Version

BLOCKED = "blocked"  # tag of a version: when it was rolled back from


@dataclass(frozen=True)
class View:
    """All that MLflow holds of a model: its versions, newest first, and the numbers by alias."""

    versions: tuple[Version, ...]
    aliases: Mapping[str, str]

    def find(self, which: str) -> Version | None:
        """The version with that number or alias, or None."""
        number = which if which.isdecimal() else self.aliases.get(which)
        return next((item for item in self.versions if item.version == number), None)

    def edits(self, ledger: Ledger) -> list[tuple[str, ...]]:
        """The calls of MLflow's client, each with what follows the model's name, after which the view is right."""
        calls: list[tuple[str, ...]] = []
        found = ledger.own(self.find(ledger.champion)) if ledger.champion else None
        champion = found.version if found else None  # None: its version was deleted
        if champion != (alias := self.aliases.get(CHAMPION)):
            if champion is not None:
                calls.append(("set_registered_model_alias", CHAMPION, champion))
            elif alias is not None:
                calls.append(("delete_registered_model_alias", CHAMPION))
        for version in self.versions:
            since = ledger.blocked_since(version)
            if since is not None and version.tags.get(BLOCKED) != since:
                calls.append(("set_model_version_tag", version.version, BLOCKED, since))
            elif since is None and BLOCKED in version.tags:
                calls.append(("delete_model_version_tag", version.version, BLOCKED))
        return calls
