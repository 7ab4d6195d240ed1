"""The metrics of a service in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Mapping

from megarecur.serving.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def write_metrics(service: Service) -> str:
    """Return the metrics of this moment."""
    engine, lines = service.engine, list[str]()

    def add(name: str, kind: str, meaning: str, value: float | Mapping[str, float]) -> None:
        values = value if isinstance(value, Mapping) else {"": value}
        lines.append(f"# HELP megarecur_{name} {meaning}")
        lines.append(f"# TYPE megarecur_{name} {kind}")
        lines.extend(f"megarecur_{name}{labels} {number}" for labels, number in values.items())

    statuses = {f'{{status="{n}"}}': count for n, count in sorted(service.statuses.items())}
    exits = {f'{{loops="{n}"}}': count for n, count in sorted(service.exits.items())}
    counts = engine.counts
    add("requests_total", "counter", "Answers by HTTP status; 499: the client left.", statuses)
    add("prompt_tokens_total", "counter", "Tokens of prompts.", service.prompt_tokens)
    add("generated_tokens_total", "counter", "New tokens.", service.exits.total())
    add("exits_total", "counter", "New tokens by the loops after which they were chosen.", exits)
    add("queue_texts", "gauge", "Texts that wait to run.", engine.num_waiting)
    add("running_texts", "gauge", "Texts that run.", engine.num_running)
    if engine.passes is not None:
        pool, scheduler = engine.passes.pool, engine.scheduler
        add("pages_used", "gauge", "Pages of keys and values in use.", pool.num_used)
        add("pages", "gauge", "Pages of the pool.", pool.num_pages)
        add("preemptions_total", "counter", "Texts that gave back pages.", scheduler.preemptions)
        add("passes_total", "counter", "Passes over groups of the map.", counts.passes)
        add("drafted_tokens_total", "counter", "Tokens that shallow loops drafted.", counts.drafted)
        add("accepted_tokens_total", "counter", "Drafts that full depth confirmed.",
            counts.accepted)  # fmt: skip
        add("draft_acceptance", "gauge", "Share of confirmed drafts so far.", counts.acceptance)
    return "\n".join(lines) + "\n"
