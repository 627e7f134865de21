"""How a client and a server of this machine find each other: beside a company's proxy."""

import os
from urllib.request import getproxies, proxy_bypass

import pytest

from vismem.runtime.access import pass_proxies

NAMES = [name for kind in ("http", "https", "all", "grpc", "no") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())]


@pytest.fixture(autouse=True)
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("proxy", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize("known", ["", "company.example"])
def test_this_machine_is_reached_beside_a_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str, known: str) -> None:
    monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", known)
    for _ in range(2):
        pass_proxies()
    assert proxy.lower().removesuffix("_proxy") in getproxies()
    for host in ("127.0.0.1:8000", "localhost", *filter(None, [known])):
        assert proxy_bypass(host)
    assert not proxy_bypass("other.example")
    assert os.environ["no_proxy"].count("localhost") == 1


def test_without_a_proxy_or_where_none_is_asked_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pass_proxies()
    assert not any(name in os.environ for name in NAMES)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    pass_proxies()
    assert (os.environ["no_proxy"], "NO_PROXY" in os.environ) == ("*", False)
