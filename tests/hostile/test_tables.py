"""Tables that carry code: Arrow extension types are refused before anything could load them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs import environment

LIST = """
import sys
from dinoray.errors import BadRequest
from dinoray.io.sources import list_items
try:
    print(len(list(list_items([sys.argv[1]]).items)), "items")
except BadRequest as error:
    print("refused:", error.what)
print("ray loaded:", any(name == "ray" or name.startswith("ray.") for name in sys.modules))
"""


class Payload:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("column", ["uri", "FileName_DNA"])
@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor",
                                  "ray.data.arrow_pickled_object", "arrow.py_extension_type", "pandas.period"])
def test_extension_types_are_refused_without_loading_them(tmp_path: Path, name: str, column: str) -> None:
    ran = tmp_path / "it ran"
    code = pickle.dumps(Payload(ran))
    field = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": code})
    pq.write_table(pa.table([["a.png"], [code]], schema=pa.schema([(column, pa.string()), field])), tmp_path / "m.parquet")
    done = subprocess.run([sys.executable, "-c", LIST, str(tmp_path / "m.parquet")], env=environment(), capture_output=True,
                          text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "ray loaded: False", done.stderr
    assert done.stdout.startswith("refused: ") and "extension types" in done.stdout and not ran.exists()
