"""Who may ask a server that has a token, by `vismem api` and `vismem serve` alike, and who may read its requests."""

import hmac
import os
from contextlib import suppress
from pathlib import Path

TOKEN_VARIABLE = "VISMEM_API_TOKEN"  # not an option: every user of the machine can read those
LOCAL, PROXIES = "127.0.0.1,localhost,::1", ("http", "https", "all", "grpc")
SHARED_MEMORY = Path("/dev/shm")
NO_TOKEN = "no such token: send `Authorization: Bearer TOKEN`"


def own_token() -> str:
    """The token that this process's environment names: what a server asks for, and what a client sends; "" is none."""
    return os.environ.get(TOKEN_VARIABLE, "").strip()


def close_shared_memory() -> None:
    """Let no other user read what Triton passes to this process: it makes that memory readable, whatever the umask."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        region = Path(line.split(maxsplit=5)[-1])
        if region.parent == SHARED_MEMORY:
            with suppress(FileNotFoundError):  # of one that has been removed
                region.chmod(0o600)


def pass_proxies() -> None:
    """Let this process and its children reach this machine's own services beside the proxy that a variable names."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    proxy = any(os.environ.get(f"{kind}_proxy") or os.environ.get(f"{kind}_proxy".upper()) for kind in PROXIES)
    if proxy and known != "*" and LOCAL not in known:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{known},{LOCAL}".strip(",")


def token_refusal(token: str, authorization: str) -> str:
    """What is said to a request whose header `Authorization` does not hold the server's token; else ""."""
    scheme, _, sent = (part.encode(errors="surrogatepass") for part in authorization.partition(" "))
    same = hmac.compare_digest(sent.strip(), token.encode(errors="surrogatepass"))
    return "" if not token or (same and scheme.lower() == b"bearer") else NO_TOKEN
