"""What a runtime counts, for Prometheus: `vismem api` shows it at /metrics, Triton among its own metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vismem.models.tokens import KINDS

FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # buckets


class Metrics:
    """Counters of one runtime, in a registry of their own. Any thread may count."""

    def __init__(self, waiting: Callable[[], int], decoding: Callable[[], int]) -> None:
        """`waiting`, `decoding`: how many answers wait for a place, and are decoded, now."""
        self.registry = registry = CollectorRegistry()
        Gauge("vismem_waiting", "Answers that wait for a place.", registry=registry).set_function(waiting)
        Gauge("vismem_decoding", "Answers that are decoded.", registry=registry).set_function(decoding)
        self.tokens = Counter("vismem_tokens", "Decoded tokens, without memories.", registry=registry)
        about = "Seconds from a question's arrival at the runtime to the first token of its answer."
        self.first_token = Histogram(
            "vismem_first_token_seconds", about, buckets=FIRST_TOKEN_SECONDS, registry=registry
        )
        self.memories = Counter("vismem_memories", "Memories that were invoked.", ["kind"], registry=registry)
        self.refused = Counter("vismem_refused", "Questions that were refused.", ["reason"], registry=registry)
        self.failures = Counter("vismem_failures", "Answers that a fault of the model ended.", registry=registry)
        self.logged = Counter("vismem_logged", "Requests of the sample that is logged.", ["outcome"], registry=registry)
        for outcome in ("written", "lost"):
            self.logged.labels(outcome)
        for kind in KINDS:
            self.memories.labels(kind.value)
        for reason in ("invalid", "busy"):
            self.refused.labels(reason)
