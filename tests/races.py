"""Races for the champion: promoters and operators who roll back, each a process, and what must hold after each race."""

import multiprocessing
import random
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project import Project

from vismem.config import Config
from vismem.errors import UserError
from vismem.records import Release
from vismem.registry import champion, listing, release
from vismem.registry.champion import append, mend_view, read_ledger
from vismem.registry.ledger import Ledger, ledger_model
from vismem.registry.tracking import find_version, versions

PROCESSES = multiprocessing.get_context("forkserver")
STORES = ("mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store")  # slow to import
PROCESSES.set_forkserver_preload(["vismem.registry.release", *STORES])
RACERS = 8
PAST = ("1", "2")  # the champions before each race


def act(config: Config, registered: Path | None, out: Path, start: Any, seconds: float | None) -> None:
    """Promote what is registered there, or roll back without; killed so many seconds after the start."""
    original = champion.append

    def append_when_all_have_decided(*given: Any) -> bool:
        champion.append = original
        start.wait(120)
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process on the spot
        return original(*given)

    champion.append = append_when_all_have_decided
    out.mkdir(parents=True)
    if registered:
        release.promote(config, {"register": registered}, out)  # a refusal is a result
    else:
        try:
            line = release.rollback(config)
        except UserError as error:
            line = str(error)
        (out / "told").write_text(line)


@dataclass
class Racer:
    """One process of a race: which version it promotes, None: it rolls back."""

    version: str | None
    out: Path
    process: Any

    @property
    def name(self) -> str:
        """As the ledger says it."""
        return f"{socket.gethostname()}:{self.process.pid}"


class Races:
    """Versions 1 to 10 of a project: 1 and 2 score the lowest, in order, the others are the promoters', in no order."""

    def __init__(self, project: Project) -> None:
        self.project, self.direct = project, project.config
        self.scores = dict(zip(PAST, (61.0, 62.0), strict=True))
        for number, score in enumerate((66.0, 70.0, 64.0, 68.0, 63.0, 69.0, 65.0, 67.0), start=3):
            self.scores[str(number)] = score
        for version, score in self.scores.items():
            project.build(version.encode(), score=score)
            assert project.run("register", f"register-{version}")["version"] == version

    def registered(self, version: str) -> Path:
        return self.project.artifacts / f"register-{version}"

    def begin(self) -> Ledger:
        """A new ledger that holds the past only, and the view of it."""
        store = self.project.store
        if store.client.search_registered_models(f"name='{ledger_model(store.model)}'"):
            store.client.delete_registered_model(ledger_model(store.model))
            store.client.delete_registered_model_alias(store.model, "champion")
        for version in PAST:
            ledger, found = read_ledger(store), find_version(store, version)
            assert found
            assert append(store, ledger, ledger.next_move("promote", found))
        ledger = read_ledger(store)
        assert mend_view(store) == ledger
        return ledger

    def run(self, seed: int) -> None:
        """A race with none to two rollbacks, two promoters of one version, and in every other race one who is killed.

        All have decided by the same ledger before the first one writes. One uses the store that the project had first.
        """
        past, dice = self.begin(), random.Random(seed)
        wanted: list[str | None] = [None] * (seed % 3)
        wanted += dice.sample(sorted(self.scores.keys() - PAST), RACERS - 1 - len(wanted))
        wanted.append(wanted[-1])
        doomed, start = dice.randrange(RACERS) if seed % 2 else None, PROCESSES.Barrier(RACERS)
        racers = []
        for number, version in enumerate(wanted):
            out, registered = self.project.artifacts / f"race-{seed}-{number}", version and self.registered(version)
            seconds = dice.uniform(0, 1) if number == doomed else None
            given = (self.project.config if number else self.direct, registered, out, start, seconds)
            racers.append(Racer(version, out, PROCESSES.Process(target=act, args=given)))
        for racer in racers:
            racer.process.start()
        seen = []
        while any(racer.process.is_alive() for racer in racers):
            seen.append(listing.read_registry(self.project.config.registry)[1])
            racers[0].process.join(0.2)
        self.check(past, racers, seen)

    def check(self, past: Ledger, racers: list[Racer], seen: list[Ledger]) -> None:
        """Hold ledger, alias, what each process was told, and what readers saw meanwhile to each other."""
        ledger = read_ledger(self.project.store)
        self.check_chain(past, ledger)
        for earlier in seen:
            assert earlier.moves == ledger.moves[: earlier.revision], "a ledger only grows"
        killed = [racer for racer in racers if racer.process.exitcode == -signal.SIGALRM]
        if killed:
            mend_view(self.project.store)
        self.check_view(ledger)
        for racer in racers:
            if racer not in killed:
                self.check_told(ledger, racer)
        for racer in killed:
            if racer.version:
                self.project.run("promote", self.registered(racer.version).name)
        self.check_chain(past, ledger := read_ledger(self.project.store))
        self.check_view(ledger)
        best = max((racer.version for racer in racers if racer.version), key=self.scores.__getitem__)
        assert ledger.champion == best

    def check_chain(self, past: Ledger, ledger: Ledger) -> None:
        """Each move follows the one before: promotions upwards and by a verdict against just that champion."""
        assert ledger.moves[: past.revision] == past.moves
        for number, move in enumerate(ledger.moves):
            before = Ledger(moves=ledger.moves[:number])
            assert move.previous == before.champion
            if move.action == "rollback":
                assert (before, move.version) == (past, before.earlier[0]), "it leaves the champion that was seen"
            elif number >= past.revision:
                assert move.previous is not None
                assert move.verdict is not None
                assert self.scores[move.version] > self.scores[move.previous]
                assert f"champion version {move.previous} " in move.verdict["champion"]

    def check_view(self, ledger: Ledger) -> None:
        """MLflow's alias and tags say what the ledger says."""
        assert self.project.champion() == ledger.champion
        tagged = {v.version: v.tags["blocked"] for v in versions(self.project.store) if "blocked" in v.tags}
        assert tagged == ledger.blocked

    def check_told(self, ledger: Ledger, racer: Racer) -> None:
        """What a process was told is what the ledger says of it."""
        assert racer.process.exitcode == 0, "no promoter fails because of another"
        own = [move for move in ledger.moves if move.by == racer.name]
        if racer.version is None:
            made = f"version {own[0].version} is champion again, instead of version {own[0].previous}" if own else ""
            assert (made or "nothing was rolled back") in (racer.out / "told").read_text()
            return
        result = Release.read(racer.out)
        if result.promoted:
            assert (promotion := ledger.promotion(racer.version)) is not None
            assert own in ([], [promotion]), "none where its twin was quicker"
            assert result.previous == promotion.previous
        else:
            beaten = [move for move in ledger.moves if f"champion version {move.version} " in result.reasons[0]]
            assert (own, beaten[0].version) == ([], result.previous)
            assert self.scores[beaten[0].version] > self.scores[racer.version]
