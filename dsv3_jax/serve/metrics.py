"""Numbers for Prometheus, read from the engine when they are asked for."""

import time
from collections.abc import Iterator

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dsv3_jax.infer.request import Job
from dsv3_jax.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_ENDS = ("stop", "length", "cancelled", "error")


class Metrics:
  """A server's own registry."""

  content_type = prometheus.CONTENT_TYPE_LATEST

  def __init__(self, worker: Worker):
    self._registry = prometheus.CollectorRegistry()
    self._registry.register(_Engine(worker))
    histogram = lambda name, text, buckets: prometheus.Histogram(
        f"dsv3_{name}", text, buckets=buckets, registry=self._registry)
    self._first = histogram("time_to_first_token_seconds", "From a request to its first token",
                            _SECONDS)
    self._whole = histogram("request_seconds", "From a request to its end", _SECONDS)
    self._each = histogram("time_per_token_seconds", "Between two tokens of a request",
                           tuple(s / 10 for s in _SECONDS))

  def ended(self, job: Job) -> None:
    """Counts a request whose text has ended; the engine may have yet to notice."""
    now = job.ended or time.monotonic()
    if job.first is None:
      return
    self._first.observe(job.first - job.submitted)
    self._whole.observe(now - job.submitted)
    if len(job.tokens) > 1:
      self._each.observe((now - job.first) / (len(job.tokens) - 1))

  def text(self) -> bytes:
    """All numbers in Prometheus' text format."""
    return prometheus.generate_latest(self._registry)


class _Engine:
  """The engine's own counts."""

  def __init__(self, worker: Worker):
    self._worker = worker

  def collect(self) -> Iterator[Metric]:
    engine = self._worker.engine
    totals, now = engine.totals, engine.counts()
    ends = CounterMetricFamily("dsv3_requests", "Requests that ended", labels=["finish"])
    for name in _ENDS:
      ends.add_metric([name], totals[name])
    yield ends
    for name, text, value in (
        ("prompt_tokens", "Tokens of prompts that were run", totals["prompt"]),
        ("generated_tokens", "Tokens that were written", totals["new"]),
        ("shared_tokens", "Tokens of prompts that were found in the cache", totals["shared"]),
        ("preemptions", "Times that a request had to give its pages back", totals["preempted"]),
        ("handed_bytes", "Cache handed from where prompts are read", totals["handed"]),
        ("engine_steps", "Steps of the engine", totals["steps"])):
      yield CounterMetricFamily(f"dsv3_{name}", text, value=value)
    for name, text, value in (
        ("requests_waiting", "Requests in the queue", now["waiting"]),
        ("requests_running", "Requests under way", now["prompt"] + now["writing"]),
        ("cache_pages_used", "Pages of the cache in use", now["pages"]),
        ("cache_pages", "Pages of the cache", engine.pages),
        ("up", "Whether the engine runs", float(self._worker.alive))):
      yield GaugeMetricFamily(f"dsv3_{name}", text, value=value)
    balancer = engine.balancer
    if balancer is not None:
      for name, text, kind, value in (
          ("expert_imbalance", "Max / mean load of the devices by today's placement of experts",
           GaugeMetricFamily, balancer.imbalance),
          ("rebalancings", "New placements of experts", CounterMetricFamily,
           balancer.totals["rebalanced"]),
          ("experts_moved", "Experts that devices fetched from others", CounterMetricFamily,
           balancer.totals["moved"])):
        yield kind(f"dsv3_{name}", text, value=value)
