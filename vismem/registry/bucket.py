"""A ledger of champions as one S3 object, replaced by conditional PUT. Readers need no MLflow for it.

Endpoint and credentials are boto3's: AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from vismem.errors import UserError
from vismem.registry.ledger import Ledger, Move

OVERTAKEN = ("PreconditionFailed", "ConditionalRequestConflict")  # S3's 412, and its 409 where two arrive at once


class BucketPlace:
    """The object `MODEL.json` below an address such as s3://BUCKET/PREFIX."""

    def __init__(self, address: str, model: str) -> None:
        self.where = f"{address.rstrip('/')}/{model}.json"
        self._bucket, _, self._key = self.where.removeprefix("s3://").partition("/")

    def read(self) -> Ledger:
        """The ledger; empty where there is no object yet. UserError where S3 does not give it, or it is damaged."""
        return self._get()[0]

    def append(self, ledger: Ledger, move: Move) -> bool:
        """Add the move, unless the ledger is no longer `ledger`; return whether it was added.

        A refused condition can be the echo of our own PUT, repeated because its answer was lost. UserError where the
        server ignores the condition of a PUT: nothing would be safe there.
        """
        present, condition = self._get()
        if present != ledger:
            return False
        grown = Ledger(moves=(*ledger.moves, move))
        told = {"champion": grown.champion, "revision": grown.revision, "blocked": grown.blocked}
        body = json.dumps(told | grown.model_dump(), indent=2, ensure_ascii=False).encode()
        added = self._put(body, condition)
        if added and ledger.revision == 0 and self._put(body, {"IfNoneMatch": "*"}):
            raise UserError(f"the S3 server of {self.where} ignores the condition of a conditional PUT: use another")
        return added or move in self.read().moves

    def _get(self) -> tuple[Ledger, dict[str, str]]:
        """The ledger, and the condition under which an object put there replaces just this one."""
        with self._translated():
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=self._key)
            except self._client.exceptions.NoSuchKey:
                return Ledger(), {"IfNoneMatch": "*"}
            body = found["Body"].read()
        try:
            return Ledger(moves=json.loads(body)["moves"]), {"IfMatch": found["ETag"]}
        except (ValueError, TypeError, KeyError) as error:  # pydantic's error is a ValueError
            raise UserError(f"the ledger of champions {self.where} is damaged ({error}): restore it") from None

    def _put(self, body: bytes, condition: dict[str, str]) -> bool:
        from botocore.exceptions import ClientError

        with self._translated():
            try:
                self._client.put_object(
                    Bucket=self._bucket, Key=self._key, Body=body, ContentType="application/json", **condition
                )
            except ClientError as error:
                if error.response["Error"]["Code"] not in OVERTAKEN:
                    raise
                return False
            return True

    @cached_property
    def _client(self) -> Any:
        import boto3

        return boto3.Session().client("s3")  # a session of its own: the default one keeps the first credentials

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what boto3 says into a UserError."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: an endpoint that is no address
            raise UserError(
                f"the ledger of champions {self.where} cannot be reached ({error}): check registry.ledger, "
                "AWS_ENDPOINT_URL_S3 and the keys; `vismem preflight` looks at buckets too"
            ) from None
