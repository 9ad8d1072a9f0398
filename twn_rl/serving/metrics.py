"""What a server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from twn_rl.inference.job import Job

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        """Start at zero."""
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "twn_rl_requests", "Answered requests", ["path", "status"], registry=own
        )
        self.seconds = Histogram(
            "twn_rl_input_seconds",
            "Seconds from an input's arrival to its vector, by whether it thought",
            ["think"],
            buckets=_SECONDS,
            registry=own,
        )
        self.decided = Counter(
            "twn_rl_inputs", "Inputs with a vector, by side and by whether they thought",
            ["side", "think"], registry=own,
        )  # fmt: skip
        self.unused = Counter(
            "twn_rl_unused_thoughts", "Thoughts that were left out", ["problem"], registry=own
        )
        self.think_tokens = Counter(
            "twn_rl_think_tokens", "Tokens written in thoughts", registry=own
        )
        self.prompt_tokens = Counter("twn_rl_prompt_tokens", "Tokens read", registry=own)
        self.failed = Counter("twn_rl_failed_inputs", "Inputs without a vector", registry=own)
        self.cancelled = Counter(
            "twn_rl_cancelled_inputs", "Inputs nobody waited for", registry=own
        )
        self.batches = Histogram(
            "twn_rl_batch_inputs",
            "Inputs read together, and thoughts at each token",
            ["work"],
            buckets=_SIZES,
            registry=own,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is asked for when the metrics are read."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def note_batch(self, work: str, size: int) -> None:
        """Count a batch of `work` "read" or "write"."""
        self.batches.labels(work).observe(size)

    def note_job(self, job: Job, side: str) -> None:
        """Count what came of a job."""
        if job.is_cancelled:
            self.cancelled.inc()
        elif job.error is not None:
            self.failed.inc()
        else:
            think = "no" if job.thought is None else "yes"
            self.decided.labels(side, think).inc()
            self.prompt_tokens.inc(job.prompt_tokens)
            self.seconds.labels(think).observe((job.done_at or job.created_at) - job.created_at)
        if job.thought is not None:
            self.think_tokens.inc(job.think_tokens)
            if job.thought.problem is not None:
                self.unused.labels(job.thought.problem).inc()

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)
