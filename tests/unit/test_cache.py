"""The cache of what was read: right values, a bound in bytes, several threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from vismem.runtime.cache import ContentCache
from vismem.runtime.images import hash_of


def test_what_is_held_is_computed_once_and_what_was_used_the_longest_ago_goes_first() -> None:
    computed: list[str] = []

    def get(key: str) -> str:
        return cache.get(key, lambda: computed.append(key) or key * 2, len)  # type: ignore[func-returns-value]

    cache = ContentCache(most=8)
    assert [get(key) for key in ("aa", "bb", "aa")] == ["aaaa", "bbbb", "aaaa"]
    assert computed == ["aa", "bb"]
    assert get("cc") == "cccc"  # bb goes
    assert get("aa") == "aaaa"
    assert computed == ["aa", "bb", "cc"]
    assert get("bb") == "bbbb"
    assert computed == ["aa", "bb", "cc", "bb"]
    assert cache.held == sum(size for _, size in cache.kept.values()) == 8


def test_what_is_larger_than_all_of_it_is_not_held_and_drives_nothing_out() -> None:
    cache = ContentCache(most=3)
    assert cache.get("a", lambda: "aaa", len) == "aaa"
    assert cache.get("b", lambda: "bbbb", len) == "bbbb"
    assert list(cache.kept) == ["a"]
    assert ContentCache(0).get("a", lambda: "a", len) == "a"


def test_what_fails_is_not_held() -> None:
    cache = ContentCache(most=3)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: str(1 / 0), len)
    assert cache.get("a", lambda: "a", len) == "a"


def test_threads_keep_its_books_right() -> None:
    cache = ContentCache(most=50)

    def use(number: int) -> None:
        key = number * 7919 % 23
        assert cache.get(key, lambda: "x" * key, len) == "x" * key

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(5_000)))
    assert cache.held == sum(size for _, size in cache.kept.values()) <= 50


def test_images_are_told_apart_by_pixels_size_and_order() -> None:
    def image(width: int, height: int, colour: Any) -> Image.Image:
        return Image.new("RGB", (width, height), colour)

    red, blue = image(2, 3, "red"), image(2, 3, "blue")
    single = [[image(2, 6, "red")], [image(6, 2, "red")], [image(3, 4, "red")], [image(2, 6, (255, 0, 1))]]
    sets: list[list[Image.Image]] = [[], *single, [red, red], [red, blue], [blue, red]]
    assert len({hash_of(images) for images in sets}) == len(sets)
    assert hash_of([image(2, 6, "red")]) == hash_of([image(2, 6, "red")])
