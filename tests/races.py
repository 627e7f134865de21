"""A race for the ledger of champions."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from vismem.registry.champion import Place, transact
from vismem.registry.ledger import Ledger, Move

PROMOTERS = 8


def race(place: Callable[[int], Place], seed: int) -> None:
    """Eight promoters, each with the place of its machine, judge by score; the best must be champion.

    All have read the empty ledger before the first writes. A move must be upwards from the champion that it names, and
    who is told that its move was made must be in the ledger, and nobody else.
    """
    start, scores = Barrier(PROMOTERS), random.Random(seed).sample(range(PROMOTERS), PROMOTERS)

    def promote(machine: int) -> bool:
        read: list[Ledger] = []

        def decide(ledger: Ledger) -> Move | None:
            if not read:
                start.wait()
            read.append(ledger)
            time.sleep(random.uniform(0, 0.002))  # between reading and writing
            beaten = int(ledger.champion or -1) >= scores[machine]
            return None if beaten else ledger.next_move("promote", str(scores[machine]))

        return transact(place(machine), decide).revision > read[-1].revision

    with ThreadPoolExecutor(PROMOTERS) as threads:
        won = [score for score, moved in zip(scores, threads.map(promote, range(PROMOTERS)), strict=True) if moved]
    moves = place(0).read().moves
    assert [int(move.version) for move in moves] == sorted(won)
    assert [move.previous for move in moves] == [None, *(move.version for move in moves[:-1])]
    assert moves[-1].version == str(PROMOTERS - 1)
