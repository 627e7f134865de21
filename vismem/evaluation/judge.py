"""A language model that scores answers, behind any endpoint that speaks OpenAI's chat completions."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2

from vismem.errors import UserError
from vismem.files import read_json, write_json

KEY = "VISMEM_JUDGE_KEY"  # of the environment: sent as the bearer token
TOGETHER = 8  # requests at once
TRIES = 3  # until a verdict can be read, the first at temperature 0
SECONDS = 120.0  # until a reply
_SCORE = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?)(?![\d.]*\d)")
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
        with ThreadPoolExecutor(TOGETHER) as pool:
            return list(pool.map(self._score, prompts))

    def _score(self, prompt: str) -> float | None:
        for attempt in range(TRIES):
            message = {"role": "user", "content": prompt}
            request = {"model": self.model, "messages": [message], "temperature": attempt / 2}
            found = {*map(float, _SCORE.findall(self._said(request)))}
            if len(found) == 1:
                return found.pop()
        return None

    def _said(self, request: dict[str, object]) -> str:
        """What the model replied, once for each request: it is read from the folder ever after."""
        content = json.dumps([self.url, request], sort_keys=True)
        file = self.kept / f"{hashlib.sha256(content.encode()).hexdigest()}.json"
        if not file.is_file():
            key = os.environ.get(KEY)
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            address = f"{self.url.rstrip('/')}/chat/completions"
            try:
                reply = httpx2.post(address, json=request, headers=headers, timeout=SECONDS)
                reply.raise_for_status()
                said = str(reply.json()["choices"][0]["message"]["content"])
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"the judge at {address} does not score ({why}): see its address and {KEY}") from None
            write_json(file, {"request": request, "reply": said})
        return str(read_json(file, "remove it")["reply"])
