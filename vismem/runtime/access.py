"""Who may ask a server that has a token: over HTTP (`vismem api`) and Triton (`vismem serve`) alike."""

import hmac
import os

TOKEN_VARIABLE = "VISMEM_API_TOKEN"  # not an option: every user of the machine can read those
NO_TOKEN = "no such token: send `Authorization: Bearer TOKEN`"


def own_token() -> str:
    """The token that this process's environment names: what a server asks for, and what a client sends; "" is none."""
    return os.environ.get(TOKEN_VARIABLE, "").strip()


def token_refusal(token: str, authorization: str) -> str:
    """What is said to a request whose header `Authorization` does not hold the server's token; else ""."""
    sent = authorization.removeprefix("Bearer ").encode(errors="surrogatepass")
    known = not token or hmac.compare_digest(sent, token.encode(errors="surrogatepass"))
    return "" if known else NO_TOKEN
