"""Outputs as they come: with retries and extensions, unfinished, without rows, damaged; and where a page may go."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.ledger import Receipt
from dinoray.report.html import write_report
from dinoray.report.quarantine import RETRY, TODO, plates_by_loss, quarantine_reasons
from dinoray.report.run import open_for_report
from dinoray.report.stages import UNITS, StageTotals, verdict
from dinoray.status import status_lines
from tests.report.outputs import item, write_units

SCRIPT, ATTRIBUTE = "<script>alert(1)</script>.png", "\"><img src=x onerror=alert('p')>"


class Page(HTMLParser):
    """Tags that are open at the end, attribute names and values, and the text of a page."""

    VOID = {"meta", "br", "img", "path", "rect"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text, self.open = "", []
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data + " "


def page_of(out: Path) -> Page:
    """The report of an output, parsed; every tag is closed."""
    page = Page(Path(write_report(str(out))).read_text())
    assert page.open == []
    return page


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two plates, five inputs quarantined; a retry that mends two and loses one in another way; an extension."""
    items = [item(f"P{p}/{w}", f"P{p}", w) for p in (1, 2) for w in ("A01", "A02", "A03", "B01", "B02")]
    bad = {"P1/A01": "truncated", "P1/A02": "truncated", "P1/A03": "truncated", "P2/A01": "decode", "P2/B02": "too_small"}
    write_units(tmp_path / "out", items, max_items=3, bad=bad)
    again = [item(f"P1/{w}", "P1", w) for w in ("A01", "A02", "A03")]
    write_units(tmp_path / "out", again, generation="001-retry", max_items=2, bad={"P1/A03": "empty"},
                replaces={one.item_id: "truncated" for one in again})
    write_units(tmp_path / "out", [item("P3/A01", "P3", "A01"), item("P3/A02", "P3", "A02")], generation="002-extend",
                bad={"P3/A02": "decode"})
    return tmp_path / "out"


def test_the_latest_receipt_of_an_item_counts(out: Path) -> None:
    run = open_for_report(str(out))
    assert (run.tally.items, run.tally.rows, run.tally.quarantined, run.row_items) == (12, 8, 4, 8)
    assert run.num_items == 12 and run.num_units == 7
    reasons = quarantine_reasons(run)
    assert [(one.name, one.count, [name for name, _ in one.examples]) for one in reasons] == [
        ("decode", 2, ["P2/A01", "P3/A02"]), ("empty", 1, ["P1/A03"]), ("too_small", 1, ["P2/B02"])]
    assert {one.name: one.count for one in reasons} == run.tally.reasons
    assert reasons[0].examples[0] == ("P2/A01", "P2/A01 is bad")
    assert reasons[0].retry == f"dinoray retry {run.store.url} --reason decode" and reasons[2].retry == ""
    assert [(one.plate, one.items, one.quarantined) for one in plates_by_loss(run)] == [
        ("P3", 2, 1), ("P2", 5, 2), ("P1", 5, 1)]


def test_page_of_an_output_with_generations(out: Path) -> None:
    page = page_of(out)
    for wanted in ("features of 12 images", "8 images with features", "4 quarantined (33.3 %)", "Added later retry 1: 3 images; "
                   "extend 2: 2 images", "All 3 plates.", "--reason decode", "By plate", "not verified yet"):
        assert wanted in page.text, wanted
    assert "P1/A01 is bad" not in page.text, "it was mended"


def test_status_tells_each_generation(out: Path) -> None:
    lines = list(status_lines(str(out)))
    assert lines[1:] [:2] == ["units   7 of 7 done, 0 pending", "images  12 of 12 done, 8 rows, 4 quarantined"]
    for line in ("generation 0 (first): 4 of 4 units done, 10 images planned",
                 "generation 1 (retry): 2 of 2 units done, 3 images planned",
                 "generation 2 (extend): 1 of 1 units done, 2 images planned", "               2  decode",
                 "               1  empty", "verified: not yet"):
        assert line in lines, line
    assert not any("truncated" in line for line in lines)
    receipt = next((out / "_dinoray/more/001-retry/receipts").iterdir())
    (out / "_SUCCESS").write_text("{}")
    assert list(status_lines(str(out)))[-1] == "verified: yes (_SUCCESS)" and open_for_report(str(out)).verified
    receipt.unlink()
    lines = list(status_lines(str(out)))
    assert lines[-1] == "verified: not yet" and lines[1] == "units   6 of 7 done, 1 pending"
    assert "generation 1 (retry): 1 of 2 units done, 3 images planned" in lines
    assert not open_for_report(str(out)).verified


def test_unfinished_and_empty_outputs_have_a_page(tmp_path: Path) -> None:
    items = [item(f"P/{w}", "P", w) for w in ("A01", "A02", "A03")]
    write_units(tmp_path / "half", items, max_items=1, undone=[1])
    page = page_of(tmp_path / "half")
    assert "2 of 3 units are done" in page.text and "rows : 1 in every well" in page.text
    write_units(tmp_path / "begun", items, undone=[0])
    page = page_of(tmp_path / "begun")
    assert "No unit is done yet." in page.text and "No rows." in page.text and "The only plate." in page.text
    write_units(tmp_path / "lost", items, bad={one.item_id: "nan" for one in items})
    page = page_of(tmp_path / "lost")
    assert "rows : no values" in page.text and "quarantined images : 1 in every well" in page.text
    assert "all were quarantined" in page.text and "3 of 3 images have no features" in page.text
    write_units(tmp_path / "nothing", [])
    assert "features of 0 images" in page_of(tmp_path / "nothing").text


def test_every_name_is_text(tmp_path: Path) -> None:
    items = [item(f"{ATTRIBUTE}/{SCRIPT}{i}", ATTRIBUTE, f"A0{i}", Batch=f"{SCRIPT}{i}", Site=SCRIPT) for i in range(1, 7)]
    write_units(tmp_path, items, channels=(SCRIPT, ATTRIBUTE), bad={items[0].item_id: ATTRIBUTE, items[1].item_id: "decode"},
                values=lambda one, channel, number: {"p50": float(one.item_id[-1])})
    page = page_of(tmp_path)
    assert "script" not in page.tags and "img" not in page.tags  # the inputs are gone, so there is no picture at all
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src"))
    assert SCRIPT in page.text and page.text.count(ATTRIBUTE) >= 10
    assert any(name == "aria-label" and ATTRIBUTE in value for name, value in page.attributes)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"identity": 3}', b'{"identity": {"settings": []}}',
                                     b'{"command": "x", "identity": {"settings": {"features": []}}, "job": {"sources": []},'
                                     b' "weights": {"source": "s", "digest": "d"}}'])
def test_a_garbled_record_is_told(tmp_path: Path, content: bytes) -> None:
    write_units(tmp_path, [item("x")])
    (tmp_path / "_dinoray/job.json").write_bytes(content)
    with pytest.raises(OutputDamaged) as caught:
        write_report(str(tmp_path))
    assert "_dinoray" in caught.value.where and "copy" in caught.value.todo
    assert not (tmp_path / "report.html").exists()


def test_missing_records_and_tables_are_told(out: Path) -> None:
    table = next((out / "_dinoray/more/002-extend/quarantine").iterdir())
    kept = table.read_bytes()
    for damage in (b"PAR1", None):
        table.write_bytes(damage) if damage else table.unlink()
        with pytest.raises(OutputDamaged, match="quarantine table"):
            write_report(str(out))
    table.write_bytes(kept)
    (out / "_dinoray/job.json").unlink()
    with pytest.raises(OutputDamaged, match="record of the job is missing"):
        write_report(str(out))


@pytest.mark.parametrize("inside", ["features/report.html", "features/P1/x.html", "dense/x", "_dinoray/job.json", "_SUCCESS",
                                    "x/../features/y.html", "link/y.html"])
def test_a_page_never_stands_among_the_data(out: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "link").symlink_to(out / "features")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.chdir(out)
    for target in (str(out / inside), inside, f"file://{out}/{inside}"):
        with pytest.raises(BadRequest, match="among the data"):
            write_report(str(out), target)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert write_report(str(out), str(out / "pages" / "features.html")).endswith("pages/features.html")


def test_a_page_never_stands_among_remote_data() -> None:
    with pytest.raises(BadRequest, match="among the data"):
        write_report("memory://bucket/out", "memory://bucket/out/features/x.html")
    with pytest.raises(BadRequest, match="not an output"):  # the place is fine, there is just no run
        write_report("memory://bucket/out", "memory://bucket/out-features/x.html")


def test_every_retry_has_its_explanation() -> None:
    assert set(TODO) > RETRY


def test_a_long_command_is_cut(tmp_path: Path) -> None:
    write_units(tmp_path, [item("x")])
    record = tmp_path / "_dinoray/job.json"
    record.write_text(record.read_text().replace("extract images", "extract images " + "x" * 10**6))
    page = Path(write_report(str(tmp_path))).read_text()
    assert len(page) < 200_000 and "all of it is in _dinoray/job.json" in page


def test_coarse_units_idle_workers_and_retries() -> None:
    totals = StageTotals()
    for pid, wall in ((1, 400.0), (2, 100.0), (3, 100.0)):
        receipt = Receipt(str(pid), pid, "f", items=100, seconds={"wall": wall, "wait_compute": wall},
                          worker={"host": "h", "pid": pid})
        receipt.retries = {"throttled": pid}  # older receipts have none
        totals.add(receipt)
    assert totals.retries == {"throttled": 6} and totals.idle() == pytest.approx(0.5)
    said = verdict(totals, {"precision": "bfloat16"}, device="cuda")
    assert said.limit == UNITS and "50%" in said.sentence and "`--unit-items 12`" in said.change
    even = StageTotals()
    for number in range(3):
        even.add(Receipt(str(number), number, "f", items=100, seconds={"wall": 100.0, "wait_compute": 95.0},
                         worker={"host": "h", "pid": number}))
    assert verdict(even, {"precision": "bfloat16"}, device="cuda").change.startswith("Nothing")
    tiny = StageTotals()
    for number in range(50):
        tiny.add(Receipt(str(number), number, "f", items=2, seconds={"wall": 0.1}, worker={"host": "h", "pid": 1}))
    assert "--unit-items 256" in verdict(tiny, {"unit_items": 2}, device="cpu").change
    assert "--unit-items" not in verdict(tiny, {"unit_items": 256}, device="cpu").change


def test_no_name_makes_the_page_large(tmp_path: Path) -> None:
    long = "n" * 300_000
    items = [item(f"{long}{i}", long, f"A0{i}", Batch=long) for i in range(1, 5)]
    write_units(tmp_path, items, channels=(long, f"{long}2"), bad={items[0].item_id: "decode"},
                values=lambda one, channel, number: {name: float(one.item_id[-1]) for name in ("p50", "focus", "p999")})
    assert len(Path(write_report(str(tmp_path))).read_bytes()) < 2_000_000
