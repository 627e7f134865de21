"""A language model that scores answers, behind any endpoint that speaks OpenAI's chat completions."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import HTTPError

from vismem.errors import UserError, first_line
from vismem.evaluation.answer_marks import without_thoughts
from vismem.files import read_json, write_json

KEY = "VISMEM_JUDGE_KEY"  # of the environment: sent as the bearer token
TOGETHER, SECONDS = 8, 120.0  # requests at once, and until a reply
# A busy endpoint is asked again after what it says, or after 0, 2, 4, 8, 16 and 32 seconds and a random bit more.
RETRY = Retry(
    6,
    connect=1,
    read=1,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    backoff_factor=1,
    backoff_jitter=1,
    retry_after_max=60,
    raise_on_status=False,
)
_BETWEEN = re.compile(r"[\s*`\"'()\[\]{}:=,;]+")  # what may stand around a number; not -1, 1/10, 1%
_SCORE = re.compile(r"(?:0(?:\.\d+)?|1(?:\.0+)?)")
_PROMPT = """Score an answer to a question about an image, which you do not see, against the reference.
{rule}
Reply with the score alone: a number from 0.0 (totally wrong) to 1.0 (totally right), such as 0.0, 0.5 or 1.0.

Question: {question}
Reference: {reference}
Answer: {answer}
Score:"""


@dataclass(frozen=True)
class Judge:
    """The endpoint at `url` (as https://host/v1), its `model`, and the folder that keeps what it said, by content."""

    url: str
    model: str
    kept: Path

    def scores(self, rule: str, asked: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """The score in [0, 1] of each (question, reference, answer) by the rule; None where no verdict can be read.

        UserError where the endpoint does not answer or refuses.
        """
        prompts = [_PROMPT.format(rule=rule, question=q, reference=r, answer=a) for q, r, a in asked]
        once = dict.fromkeys(prompts)
        with requests.Session() as session, ThreadPoolExecutor(TOGETHER) as pool:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(pool_maxsize=TOGETHER, max_retries=RETRY))
            replies = dict(zip(once, pool.map(partial(self._reply, session), once), strict=True))
        return [_score_in(replies[prompt]) for prompt in prompts]

    def _reply(self, session: requests.Session, prompt: str) -> str:
        """What the model replies at temperature 0: asked once, and read from the folder ever after."""
        request = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0.0}
        address, key = f"{self.url.rstrip('/')}/chat/completions", os.environ.get(KEY)
        file = self.kept / f"{hashlib.sha256(json.dumps([address, request]).encode()).hexdigest()}.json"
        if not file.is_file():
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            try:
                response = session.post(address, json=request, headers=headers, timeout=SECONDS)
                response.raise_for_status()
                reply = str(response.json()["choices"][0]["message"]["content"])
                reply = reply.encode(errors="replace").decode()  # a half of a character cannot be kept
            except (requests.RequestException, HTTPError, LookupError, RecursionError, TypeError, ValueError) as error:
                why = f"the judge at {address} does not score ({first_line(error)})"
                raise UserError(f"{why}: see its address and {KEY}") from None
            write_json(file, {"request": request, "reply": reply})
        return str(read_json(file, "remove it")["reply"])


def _score_in(reply: str) -> float | None:
    """The only number of a reply, thoughts apart, if it is one from 0 to 1."""
    words = _BETWEEN.split(without_thoughts(reply))
    numbers = [word.rstrip(".!") for word in words if any(map(str.isdigit, word))]
    scores = {float(number) if _SCORE.fullmatch(number) else None for number in numbers}
    return scores.pop() if len(scores) == 1 else None
