"""The ledger of champions as a value: what follows from its moves, and which entries of a race took effect."""

import pytest

from vismem.errors import UserError
from vismem.registry.ledger import Ledger, effective
from vismem.registry.versions import Version
from vismem.registry.view import View


def plain(number: str, **tags: str) -> Version:
    return Version(number, "", "", 0.0, tags)


def ledger(*moves: str) -> Ledger:
    """The ledger after moves such as "promote 1"."""
    made = Ledger()
    for move in moves:
        action, version = move.split()
        made = Ledger(moves=(*made.moves, made.next_move(action, plain(version))))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(
    ("moves", "champion", "blocked", "earlier"),
    [
        ((), None, set(), []),
        (("promote 1",), "1", set(), []),
        (("promote 1", "promote 2", "promote 3"), "3", set(), ["2", "1"]),
        (("promote 1", "promote 2", "promote 3", "rollback 2"), "2", {"3"}, ["1"]),
        (("promote 1", "promote 2", "promote 3", "rollback 2", "rollback 1"), "1", {"2", "3"}, []),
        (("promote 1", "promote 2", "rollback 1", "promote 3"), "3", {"2"}, ["1"]),
        (("promote 1", "promote 2", "rollback 1", "promote 2"), "2", set(), ["1"]),
        (("promote 1", "promote 2", "promote 1", "rollback 2"), "2", {"1"}, []),
        (("promote 1", "promote 2", "promote 3", "rollback 1"), "1", {"3"}, []),  # 2 was deleted
        (("adopt 4", "promote 5"), "5", set(), ["4"]),
    ],
)
def test_champion_blocked_versions_and_the_way_back_follow_from_the_moves(
    moves: tuple[str, ...], champion: str | None, blocked: set[str], earlier: list[str]
) -> None:
    made = ledger(*moves)
    assert (made.champion, made.revision) == (champion, len(moves))
    assert (made.blocked.keys(), made.earlier) == (blocked, earlier)


def test_another_version_of_a_blocked_number_is_not_blocked() -> None:
    made = Ledger()
    for action, number, manifest in (("promote", "1", "a"), ("promote", "2", "b"), ("rollback", "1", "a")):
        move = made.next_move(action, plain(number, manifest_sha256=manifest))  # type: ignore[arg-type]
        made = Ledger(moves=(*made.moves, move))
    old, new = plain("2", manifest_sha256="b"), plain("2", manifest_sha256="c")
    assert made.blocked_since(old) == made.moves[-1].time
    assert made.blocked_since(new) is None


def entry(number: int, revision: int, move: str) -> Version:
    action, version = move.split()
    made = ledger().next_move(action, plain(version))  # type: ignore[arg-type]
    return Version(str(number), "", "", 0.0, {"revision": str(revision), "move": made.model_dump_json()})


def test_of_entries_that_expect_the_same_revision_the_first_takes_effect_whatever_their_order_of_arrival() -> None:
    entries = [
        entry(10, 2, "promote 9"),
        *(entry(n, 0, f"promote {n}") for n in range(1, 9)),
        entry(9, 1, "rollback 3"),
    ]
    for given in (entries, entries[::-1]):
        assert [move.version for move in effective(given)] == ["1", "3", "9"]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_ledger_that_lost_an_entry_is_refused_rather_than_read_otherwise(lost: int) -> None:
    entries = [entry(1, 0, "promote 1"), entry(2, 1, "promote 2"), entry(3, 1, "promote 3"), entry(4, 2, "promote 4")]
    del entries[lost - 1]
    with pytest.raises(UserError, match=f"has lost its entry {lost}"):
        effective(entries)


@pytest.mark.parametrize("tags", [{}, {"revision": "0"}, {"revision": "0", "move": '{"version": "9"}'}])
def test_an_entry_that_is_no_move_is_named(tags: dict[str, str]) -> None:
    with pytest.raises(UserError, match="entry 1 of the ledger of champions cannot be read"):
        effective([Version("1", "", "", 0.0, tags)])


def test_the_view_needs_exactly_the_edits_that_make_it_say_what_the_ledger_says() -> None:
    made = ledger("promote 1", "promote 2", "rollback 1")
    since = made.blocked["2"]
    plain = [Version(number, "", "", 0.0, {}) for number in ("2", "1")]
    done = [Version("2", "", "", 0.0, {"blocked": since}), plain[1]]
    assert View(tuple(done), {"champion": "1"}).edits(made) == []
    assert View(tuple(plain), {"champion": "2"}).edits(made) == [
        ("set_registered_model_alias", "champion", "1"),
        ("set_model_version_tag", "2", "blocked", since),
    ]
    stale = [plain[0], Version("1", "", "", 0.0, {"blocked": "then"})]
    assert ("delete_model_version_tag", "1", "blocked") in View(tuple(stale), {}).edits(made)
    without = View((done[0],), {"champion": "2"})  # the champion's version was deleted
    assert without.edits(made) == [("delete_registered_model_alias", "champion")]
    assert View((), {}).edits(made) == []


def test_a_version_that_got_a_champion_s_number_in_a_model_made_anew_is_not_that_champion() -> None:
    made = Ledger(moves=(Ledger().next_move("promote", plain("1", manifest_sha256="old")),))
    old, new = (plain("1", manifest_sha256=name) for name in ("old", "new"))
    assert (made.means(old), made.means(new), ledger("promote 1").means(new)) == (True, False, True)
    assert View((old,), {}).edits(made) == [("set_registered_model_alias", "champion", "1")]
    assert View((new,), {}).edits(made) == []
    assert View((new,), {"champion": "1"}).edits(made) == [("delete_registered_model_alias", "champion")]
    assert View((new,), {}).edits(ledger("promote 1")) == [("set_registered_model_alias", "champion", "1")]
