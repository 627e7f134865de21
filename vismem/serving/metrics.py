"""What a runtime counts, for Prometheus: `vismem api` shows it at /metrics, Triton among its own metrics."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from vismem.models.tokens import KINDS

FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # buckets
PER_ANSWER = "memories_per_answer"  # of the evaluation, by kind: in a bundle's lineage.json


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
        about = "Memories of an answer that ended, of those whose memories the model chose; without probes."
        self.per_answer = Summary("vismem_memories_per_answer", about, ["kind"], registry=registry)
        about = "Memories per answer of the evaluation of the bundle that is served."
        self.evaluated = Gauge("vismem_evaluation_memories_per_answer", about, ["kind"], registry=registry)
        self.refused = Counter("vismem_refused", "Questions that were refused.", ["reason"], registry=registry)
        self.failures = Counter("vismem_failures", "Answers that a fault of the model ended.", registry=registry)
        self.logged = Counter("vismem_logged", "Requests of the sample that is logged.", ["outcome"], registry=registry)
        for outcome in ("written", "lost"):
            self.logged.labels(outcome)
        for kind in KINDS:
            self.memories.labels(kind.value)
            self.per_answer.labels(kind.value)
        for reason in ("invalid", "busy"):
            self.refused.labels(reason)

    def show_evaluation(self, bundle: Path) -> None:
        """Show the evaluation's memories per answer; nothing where the bundle names none, as older ones."""
        file = bundle / "lineage.json"
        lineage = json.loads(file.read_text()) if file.is_file() else {}
        for kind, value in (lineage.get(PER_ANSWER) or {}).items():
            self.evaluated.labels(kind).set(value)

    def answered(self, mode: str, memories: Mapping[str, int]) -> None:
        """Count an answer that ended, no probe, if it is one as in the evaluation; `memories` it invoked, by kind."""
        if mode == "learned":
            for kind in KINDS:
                self.per_answer.labels(kind.value).observe(memories.get(kind.value, 0))
