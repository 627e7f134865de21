"""Does a runtime answer? Found by a real question of one token; one that decodes for others is not asked."""

import logging
import threading
import time

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from vismem.serving.answering import Busy, Runtime

FRESH = 5.0  # seconds for which a decoded token, or a verdict, is proof enough
PATIENCE = 30.0  # seconds without one after which the runtime counts as hung: a long prompt may take many
POLL = 0.05

logger = logging.getLogger(__name__)


def status_routes(runtime: Runtime) -> APIRouter:
    """`/health`, with status 503 and the reason where the runtime does not answer, and `/metrics` for Prometheus."""
    routes, check = APIRouter(), HealthCheck(runtime)

    @routes.api_route("/health", methods=["GET", "HEAD"])
    def health() -> JSONResponse:
        problem = check.problem()
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    @routes.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(runtime.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


class HealthCheck:
    """Asks a runtime, at most once every FRESH seconds."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.lock = threading.Lock()  # of the one call that finds out
        self.asker: threading.Thread | None = None
        self.asked = 0.0  # when, by time.monotonic()
        self.fault = ""  # what the question ended with
        self.busy = False  # it got no place
        self.said = "it has not answered yet"  # the last verdict

    def problem(self) -> str:
        """Why the runtime does not answer, or nothing. While a call finds out, others get the last verdict."""
        if self.lock.acquire(blocking=False):
            try:
                self.said = self._problem()
            finally:
                self.lock.release()
        return self.said

    def _problem(self) -> str:
        runtime, now = self.runtime, time.monotonic()
        if runtime.stepped > now - FRESH:
            return ""
        if self.asker is None or not self.asker.is_alive():  # else the question of before is not answered yet
            self.fault, self.busy, self.asked = "", False, now
            self.asker = threading.Thread(target=self._ask, name="health", daemon=True)
            self.asker.start()
        while runtime.stepped < self.asked:
            if runtime.closed:
                return "the thread that decodes has ended"
            if self.fault:
                return self.fault
            if self.busy and runtime.decoding.held:  # others' images are decoded: no token can be there yet
                return ""
            if time.monotonic() > self.asked + PATIENCE:
                return f"no token was decoded for {PATIENCE:g} s"
            time.sleep(POLL)
        return ""

    def _ask(self) -> None:
        image = Image.new("RGB", (84, 84), "white")
        try:
            for _ in self.runtime.generate([image], "?", max_new_tokens=1):
                pass
        except Busy:  # then it is others' tokens that prove it
            self.busy = True
        except Exception as error:  # the verdict
            logger.error("the model fails", exc_info=error)
            self.fault = f"the model fails: {type(error).__name__}"  # all may read it
