"""A whole node of a cluster goes away in mid-run: the run ends complete in the same process, with the same bytes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from dinoray.ledger import Ledger
from dinoray.verification import open_run
from tests.conftest import texture
from tests.runs import ALL_FEATURES, check_whole, command, data_objects, environment, run

HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
          "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_failure_threshold": "5"}
STORE_BYTES = 100 * 2**20


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that does no work and two nodes of one CPU each, whose items take a quarter of a second."""
    from ray.cluster_utils import Cluster

    for name, value in {**HEALTH, "DINORAY_FAILPOINTS": "item.load=sleep:0.25@*"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # the nodes keep the address that Ray finds: a driver that joins takes a cluster on 127.0.0.1 to be there too
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False,
                                                         "object_store_memory": STORE_BYTES})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()  # its own processes only


def workers_of(node: Any) -> set[int]:
    """The processes of a node."""
    raylet = next(p.process.pid for p in node.all_processes["raylet"])
    return {child.pid for child in psutil.Process(raylet).children(recursive=True)}


def is_monitor(pid: int) -> bool:
    try:
        return "ray::Monitor" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False


def pids_at_work(out: Path, *, unfinished: bool = False) -> list[int]:
    """The processes that began units; `unfinished`: that have one in work now."""
    folder, receipts = out / "_dinoray/attempts", out / "_dinoray/receipts"
    begun = list(folder.iterdir()) if folder.is_dir() else []
    return [json.loads(path.read_text())["pid"] for path in begun
            if not (unfinished and (receipts / f"{path.name.rpartition('-')[0]}.json").exists())]


def wait(until: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not until():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_that_is_lost_costs_only_the_units_in_work(cluster: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(texture((256, 256), i)).save(folder / f"{i:02d}.png")
    argv = command(folder, out, "--features", ",".join(ALL_FEATURES), "--unit-items", "4", "--workers", "2", "--scaling", "image")
    env = {**environment(), "RAY_ADDRESS": cluster.address}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            wait(lambda: len(set(pids_at_work(out))) == 2, process)
            nodes = [(node, workers_of(node)) for node in cluster.list_all_nodes()]
            assert [is_monitor(pid) for pid in workers_of(cluster.head_node)].count(True) == 1, "it outlives every other node"
            found: list[Any] = []
            wait(lambda: bool(found.extend(n for n in nodes if n[1] & set(pids_at_work(out, unfinished=True))) or found), process)
            lost, gone = found[0]
            cluster.remove_node(lost, allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            printed = process.communicate(timeout=300)[0]
        finally:
            process.kill()
    assert process.returncode == 0, printed
    check_whole(out)
    run(folder, tmp_path / "clean", features=ALL_FEATURES, unit_items=4, scaling="image")
    assert data_objects(out) == data_objects(tmp_path / "clean")
    store, plan, ledger = open_run(str(out))
    receipts = list(ledger.receipts(plan.unit_ids))
    assert {receipt.worker["pid"] for receipt in receipts} - gone, "others did the rest"
    assert sum(receipt.quarantined for receipt in receipts) == 0
    attempts = Ledger(store).attempts()
    assert sum(attempts.values()) > len(plan), "a unit was in work on the node"
    assert sum(attempts.values()) <= len(plan) + 4, "only what was in work was started again"
