"""Names from outside: of files, plates and ids. Nothing is written outside the output, and the page stays a page."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinoray import open_features
from dinoray.io.sources import list_items
from dinoray.report.html import write_report
from tests.conftest import texture
from tests.omezarr import write_plate
from tests.runs import check_whole, data_objects, run, use_tiny_backbone

SCRIPT = "<script>alert(1)</script>.png"
FORMULA = "=cmd|'/c calc'!A1.png"
NAMES = [SCRIPT, FORMULA, "\" onerror=\"alert(2).png", "-rf.png", "--out=x.png", "..png", "...png", "%2e%2e%2fx.png",
         "{{7*7}}.png", "${HOME}.png", "$(touch x).png", "a;b&c|d.png", "CON.png", "e\u0301.png", "\u00e9.png",
         "p\u0430ypal.png", "x" * 240 + ".png", "back\\slash.png", "a\tb.png", "new\nline.png", "\u202egnp.exe.png",
         "&lt;b&gt;.png", "javascript:alert(3).png", "::1.png", "@SUM(1).png", "+1.png"]
BAD_ID = {"a\tb.png", "new\nline.png", "\u202egnp.exe.png"}
PLATES = ["../../etc", "..", ".", "/abs/path", "P" * 300, "nul\0byte", "\u202eetalp", "_dinoray", ".hidden", "Plate=1", "a/b",
          "a\\b", "CON", "e\u0301", "\u00e9", " ", "%2e%2e", "<b>x</b>", "new\nline", "\U0001f4a9"]


class Page(HTMLParser):
    """Tags and attribute names of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.handlers, self.text = 0, [], ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count what a browser would run."""
        self.scripts += tag == "script"
        self.handlers += [name for name, value in attrs if name.startswith("on") or
                          name in ("href", "src", "action") and (value or "").lstrip().lower().startswith("javascript:")]

    def handle_data(self, data: str) -> None:
        """Gather what a reader sees."""
        self.text += data


def tree(folder: Path) -> set[str]:
    """Every path below a folder."""
    return {os.path.join(top, name) for top, folders, files in os.walk(folder) for name in folders + files}


def test_hostile_file_names_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)
    source, out = tmp_path / "in", tmp_path / "out"
    for i, name in enumerate(NAMES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture((32, 32), i)).save(source / name, format="PNG")
    (source / f"broken{SCRIPT.replace('/', '')}").write_bytes(b"<html>")
    before = tree(tmp_path)
    run(source, out)
    report = write_report(str(out), None)
    check_whole(out)
    assert {path for path in tree(tmp_path) - before if not path.startswith(str(out))} == set()
    ids = set(open_features(str(out)).table(columns=["item_id"])["item_id"].to_pylist())
    listing = list_items([str(source)])
    assert sum(1 for _ in listing.items) == len(NAMES) - 1 and listing.ignored == {"hidden .png": 2}
    # hidden files are passed over and counted; the others stand as they are, none is normalised away
    assert ids == set(NAMES) - BAD_ID - {"..png", "...png"}
    page = Page()
    page.feed(Path(report).read_text())
    plain = Page()
    plain.feed((Path(report).read_text()).replace(SCRIPT, ""))
    assert page.scripts == plain.scripts and page.handlers == []
    assert "<script>alert(1)" not in Path(report).read_text() and "alert(1)" in page.text and FORMULA in page.text


def test_hostile_plates_of_a_manifest_stay_in_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)
    source, out = tmp_path / "in", tmp_path / "deep" / "out"
    source.mkdir()
    for i in range(len(PLATES)):
        Image.fromarray(texture((32, 32), i)).save(source / f"{i}.png")
    table = pa.table({"uri": [f"{i}.png" for i in range(len(PLATES))], "Plate": PLATES, "Well": ["../A01"] * len(PLATES)})
    pq.write_table(table, source / "m.parquet")
    before = tree(tmp_path)
    run(source / "m.parquet", out)
    page = Path(write_report(str(out), None)).read_text()
    assert "<b>x</b>" not in page
    check_whole(out)
    assert {path for path in tree(tmp_path) - before if not path.startswith(str(tmp_path / "deep"))} == set()
    assert tree(tmp_path / "deep") - tree(out) == {str(out)}
    read = open_features(str(out)).table(columns=["Metadata_Plate"])["Metadata_Plate"].to_pylist()
    assert set(read) == set(PLATES)
    folders = {key.split("/")[1] for key in data_objects(out)}
    assert len(folders) == len(PLATES) and all(len(f) <= 200 and f.isascii() and f[0] not in "._" for f in folders)


def test_hostile_plates_of_other_sources(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"x")
    lines = [f'a.tif,"{plate}",A01,1' for plate in PLATES if "\0" not in plate and "\n" not in plate]
    (tmp_path / "l.csv").write_text("FileName_DNA,Metadata_Plate,Metadata_Well,Metadata_Site\n" + "\n".join(lines) + "\n")
    items = list(list_items([str(tmp_path / "l.csv")]).items)
    assert len(items) == len(lines)
    for item in items:
        assert ".." not in item.item_id.split("/") and not item.item_id.startswith("/")
    for i, plate in enumerate(["%2e%2e", "\u202ex", "a\nb", "_dinoray2"]):
        write_plate(tmp_path / "z" / str(i) / f"{plate}.zarr", {"A/1": [texture((2, 32, 32), 1, "uint16")]})
    problems = {item.plate: (item.problem or "").partition(":")[0] for item in list_items([str(tmp_path / "z")]).items}
    assert problems == {"%2e%2e": "", "\\x202ex": "bad_id", "a\\x0ab": "bad_id", "_dinoray2": ""}


def test_halves_of_characters_in_metadata_are_stored_as_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON can hold what UTF-8 cannot: a lone surrogate in a channel's name or an acquisition."""
    use_tiny_backbone(monkeypatch)
    plate = write_plate(tmp_path / "P.zarr", {"A/1": [texture((2, 32, 32), 1, "uint16")]}, channels=("D\ud800", "ER"))
    text = (plate / "A" / "1" / ".zattrs").read_text()
    (plate / "A" / "1" / ".zattrs").write_text(text.replace('"acquisition": 1', '"acquisition": "\\ud83d"'))
    outcome = run(plate, tmp_path / "out")
    check_whole(tmp_path / "out")
    table = open_features(str(tmp_path / "out")).table(columns=["channel", "Metadata_Acquisition"])
    assert outcome.tally.items == 1 and set(table["Metadata_Acquisition"].to_pylist()) == {"\\xd83d"}
    assert np.all(["\ud800" not in name for name in table["channel"].to_pylist()])
