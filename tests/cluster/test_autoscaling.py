"""The shipped cluster.yaml with a cloud on this machine in place of AWS: from zero workers and back to zero."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image
from ray.autoscaler._private.util import prepare_config

from dinoray.cluster import resources
from dinoray.errors import BadRequest
from dinoray.verification import open_run
from tests.cluster.heads import ROOT, free_port
from tests.conftest import texture
from tests.runs import check_whole, data_objects, run

HEAD_ID = "f" * 51 + "00000"
START_S, STALL_S = 16, 12
"""A node takes longer to start than the silence after which actors count as hung."""


def fake_config(port: int, log: Path) -> dict[str, Any]:
    """cluster.yaml with another provider, one CPU for each CPU node, and an idle time of 6 s."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    config["provider"] = {
        "type": "external", "module": "tests.cluster.fake_cloud.FakeCloud", "launch_multiple": True,
        "head_node_id": HEAD_ID, "gcs_address": f"127.0.0.1:{port}", "use_node_id_as_ip": True,
        "disable_node_updaters": True, "disable_launch_config_check": True, "start_s": START_S, "log": str(log)}
    config["file_mounts"], config["idle_timeout_minutes"] = {}, 0.1
    for node_type in config["available_node_types"].values():
        node_type["node_config"] = {}
    config["available_node_types"]["cpu_spot"]["resources"] = {"CPU": 1, "object_store_memory": 80_000_000}
    return config


class Cloud:
    """The running cluster: `env` to join it, `events()` of its provider."""

    def __init__(self, env: dict[str, str], log: Path):
        self.env, self.log = env, log

    def events(self) -> list[dict[str, Any]]:
        """What the provider did so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def nodes(self) -> int:
        """Worker nodes that are there now."""
        kinds = [event["event"] for event in self.events()]
        return kinds.count("started") - kinds.count("ended")


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    """A head of no CPUs with the autoscaler of cluster.yaml and, as there, token authentication."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dra-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        log, config = Path(folder) / "cloud.jsonl", Path(folder) / "cluster.yaml"
        config.write_text(yaml.safe_dump(fake_config(port, log)))
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
            # Ray takes the machine's own address, not 127.0.0.1, where an autoscaler is on: so with a token
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
             f"--port={port}", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", f"--temp-dir={folder}",
             f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
             "--object-store-memory=80000000", f"--autoscaling-config={config}"],
            env=env | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
                       "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
                       # each unit takes its time: there is a backlog to grow for, and still is when a slow machine has
                       # the second actor ready
                       "DINORAY_FAILPOINTS": ",".join(f"unit.begin=sleep:4@{n}" for n in range(1, 100))},
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for_autoscaler(Path(folder), head)
            yield Cloud(env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, log)
        finally:
            end_all(folder, head)


def wait_for_autoscaler(folder: Path, head: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("session_latest/logs/monitor.log")):
        assert head.poll() is None, head.stdout.read()
        assert time.monotonic() < deadline, "the autoscaler did not start"
        time.sleep(0.2)


def end_all(folder: str, head: subprocess.Popen[str]) -> None:
    """Kill the head and every process of this cluster: the fake nodes outlive the head."""
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()
    head.stdout.close()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == folder:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_grows_the_cluster_from_zero_and_leaves_it_to_shrink(cloud: Cloud, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(24):
        Image.fromarray(texture((64, 64), i)).save(folder / f"{i:02d}.png")
    assert cloud.events() == []
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/extract_images.py"), str(ROOT / "jobs/configs/extract_images.yaml"),
         "model=vits16", "weights=random", f"sources={folder}", f"out={out}", "unit_items=1", "workers=1,2",
         f"stall_timeout_s={STALL_S}"], env=cloud.env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "complete: 24 images, 24 rows" in done.stdout
    assert "waiting for one" in done.stderr  # it said what it waits for
    assert "no actor has moved" not in done.stderr  # and was not taken for hung, although
    asked, started = ([e["time"] for e in cloud.events() if e["event"] == kind] for kind in ("asked", "started"))
    assert started[0] - asked[0] > STALL_S
    assert {event["type"] for event in cloud.events()} == {"cpu_spot"}  # no GPU node was rented for CPU work
    assert len(started) >= 2, cloud.events()
    store, plan, ledger = open_run(str(out))
    assert len({receipt.worker["pid"] for receipt in ledger.receipts(plan.unit_ids)}) == 2
    check_whole(out)
    run(folder, tmp_path / "clean", model="vits16", unit_items=1, channels="each")
    assert data_objects(out) == data_objects(tmp_path / "clean")
    deadline = time.monotonic() + 120
    while cloud.nodes():
        assert time.monotonic() < deadline, cloud.events()
        time.sleep(0.5)


def present(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float], grows: bool = True) -> None:
    """Let `actor_shape` see a cluster of these nodes."""
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0) + amount
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(resources.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    monkeypatch.setattr(resources, "may_grow", lambda: grows)


def shape(workers: str, device: str = "cpu", compute_threads: int | None = None) -> tuple[int, int, int, int]:
    found = resources.actor_shape(workers, device=device, decode_threads=None, compute_threads=compute_threads)
    return found.min_workers, found.max_workers, found.num_cpus, found.num_gpus


def test_actors_on_a_cluster_that_has_no_worker_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, {"CPU": 0})
    assert shape("1,8") == (1, 8, 1, 0)  # one core fits every node that may come
    assert shape("1,8", compute_threads=16) == (1, 8, 16, 0)
    assert shape("1,8", "cuda") == (1, 8, 5, 1)
    for device in ("cpu", "cuda"):
        with pytest.raises(BadRequest, match="MIN,MAX"):
            shape("auto", device)


def test_a_range_of_actors_asks_for_nodes_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, {"CPU": 0}, {"CPU": 16})
    assert shape("1,8") == (1, 8, 16, 0)  # one actor fills the node, so eight need eight nodes
    assert shape("4") == (4, 4, 4, 0)
    assert shape("2,8") == (2, 8, 8, 0)


def test_a_cluster_that_cannot_grow_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, {"CPU": 8}, grows=False)
    assert shape("1,8") == (1, 8, 1, 0)
    assert shape("auto") == (1, 1, 8, 0)
    with pytest.raises(BadRequest, match="do not fit"):
        shape("9")
