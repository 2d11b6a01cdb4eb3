"""`write_report`: one self-contained HTML page about a run."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment

from dinoray.io.stores import open_store
from dinoray.verification import open_run


def write_report(out: str, to: str | None = None) -> str:
    """Write the report of the run in `out`; returns where. (First thread: facts and counts.)"""
    store, plan, ledger = open_run(out)
    done = ledger.done()
    receipts = list(ledger.receipts([u for u in plan.unit_ids if u in done]))
    page = Environment(autoescape=True).from_string(
        "<!doctype html><meta charset=utf-8><title>dinoray report</title><h1>{{ out }}</h1>"
        "<p>{{ items }} images, {{ rows }} rows</p>").render(
            out=out, items=sum(r.items for r in receipts), rows=sum(r.rows for r in receipts)).encode()
    if to is None:
        open_store(out).put("report.html", page)
        return f"{store.url}/report.html"
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    Path(to).write_bytes(page)
    return to
