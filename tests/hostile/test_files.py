"""Files that are not what their names say: quarantined with a reason, in bounded time and memory."""

from __future__ import annotations

import io
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoray.errors import ItemError
from dinoray.io.images import load_item
from dinoray.io.sources import list_items
from tests.conftest import texture
from tests.runs import environment


class Bomb:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def reasons(folder: Path) -> dict[str, str]:
    """Item id -> the reason why it is refused, "" when it loads."""
    found = {}
    for item in list_items([str(folder)]).items:
        try:
            load_item(item)
            found[item.item_id] = ""
        except ItemError as error:
            found[item.item_id] = error.reason
    return found


def zipped(**members: bytes) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(value: object) -> bytes:
    """A .npy file; objects are pickled inside."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_other_files_with_the_names_of_images(tmp_path: Path) -> None:
    folder, ran = tmp_path / "in", tmp_path / "it ran"
    folder.mkdir()
    bomb = Bomb(ran)
    files = {
        "html.png": (b"<!DOCTYPE html><script>alert(1)</script>", "not_image"),
        "zip.png": (zipped(a=b"x"), "unsupported"),
        "npz.tif": (zipped(**{"a.npy": npy(bomb)}), "unsupported"),
        "npy.tif": (npy(bomb), "unsupported"),
        "pickle.png": (pickle.dumps(bomb), "not_image"),
        "gzip.tif": (b"\x1f\x8b\x08" + bytes(100), "unsupported"),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "not_image"),
        "ps.jpg": (b"%!PS-Adobe-3.0\n(/etc/passwd) run", "not_image"),
        "mvg.gif": (b"push graphic-context\nfill 'url(https://example.com/)'", "not_image"),
        "elf.tif": (b"\x7fELF" + bytes(60), "not_image"),
        "text.webp": (b"RIFF\0\0\0\0WEBP", "decode"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    assert reasons(folder) == {name: reason for name, (_, reason) in files.items()}
    assert not ran.exists()
    pickle.loads(pickle.dumps(bomb))
    assert ran.exists()  # the test would notice


def test_special_files_and_links(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(texture((8, 8), 1)).save(folder / "good.png")
    os.mkfifo(folder / "fifo.png")
    os.symlink("/dev/zero", folder / "zero.png")
    os.symlink("/dev/tty", folder / "tty.png")
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("b.png", folder / "a.png")
    os.symlink("a.png", folder / "b.png")
    os.symlink(folder, folder / "sub" / "up")
    os.symlink("/", folder / "sub" / "root")
    os.symlink("nowhere", folder / "dangling.png")
    (folder / "folder.png").mkdir()
    server = socket.socket(socket.AF_UNIX)
    old = os.getcwd()
    os.chdir(folder)  # the path of a socket may have 107 bytes
    try:
        server.bind("socket.png")
    finally:
        os.chdir(old)
    found = reasons(folder)
    server.close()
    assert found.pop("good.png") == ""
    assert found == dict.fromkeys(["fifo.png", "zero.png", "tty.png", "loop.png", "a.png", "b.png", "dangling.png", "socket.png"],
                                  "missing")


SPARSE = """
import resource, sys
from dinoray.io.images import load_item
from dinoray.io.sources import list_items
from dinoray.errors import ItemError
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
for item in list_items([sys.argv[1]]).items:
    try:
        load_item(item)
    except ItemError as error:
        print(item.item_id, error.reason)
"""


def test_sparse_huge_files_are_not_read(tmp_path: Path) -> None:
    """Files of terabytes on a few blocks of disk, in a child that could not hold 2 GB."""
    for name, size, head in (("a.png", 2**42, b""), ("b.tif", 3 * 2**30, b""), ("c.png", 3 * 2**30, b"<html>")):
        with (tmp_path / name).open("wb") as file:
            file.write(head)
            try:
                file.truncate(size)
            except OSError:  # a file system with smaller files
                file.truncate(2**40)
    done = subprocess.run([sys.executable, "-c", SPARSE, str(tmp_path)], env=environment(), capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.splitlines() == ["a.png too_large", "b.tif not_image", "c.png not_image"], done.stderr


@pytest.mark.parametrize("kind", ["loop", "deep"])
def test_trees_that_do_not_end(tmp_path: Path, kind: str) -> None:
    here = tmp_path
    for i in range(40):
        here = here / f"d{i}"
        here.mkdir()
        if kind == "loop":
            os.symlink(tmp_path, here / "again")
    (here / "x.png").write_bytes(b"x")
    assert len(list(list_items([str(tmp_path)]).items)) == 1
