"""How a client and a server of this machine find each other, beside a company's proxy, and who sends the token."""

import os
from urllib.request import getproxies, proxy_bypass

import pytest

from vismem.runtime.access import NO_TOKEN, pass_proxies, token_refusal

NAMES = [name for kind in ("http", "https", "all", "grpc", "no") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())]
TAKEN = ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "]  # of a server whose token is s3cret
REFUSED = ["", "s3cret", "Basic s3cret", "Bearer", "Bearer s3cre", "Bearer Bearer s3cret", "\ud800"]


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


@pytest.mark.parametrize("sent", TAKEN)
def test_the_scheme_of_a_token_is_written_in_any_case(sent: str) -> None:
    assert token_refusal("s3cret", sent) == ""


@pytest.mark.parametrize("sent", REFUSED)
def test_who_sends_no_token_or_another_is_refused(sent: str) -> None:
    assert token_refusal("s3cret", sent) == NO_TOKEN
    assert token_refusal("", sent) == ""
