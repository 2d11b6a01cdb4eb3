"""doctor cluster: real dashboards with and without a token, ports, nodes, versions."""

from __future__ import annotations

import http.server
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dinoray.cluster import doctor
from dinoray.errors import BadRequest
from tests.cluster.heads import start_head


def run_doctor(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dinoray.cli", "doctor", "cluster", *arguments], env=env,
                          capture_output=True, text=True, timeout=200)


@pytest.mark.ray
def test_an_open_dashboard_and_too_few_cores_for_a_gpu() -> None:
    with start_head(gpus=1) as env:
        done = run_doctor(env | {"RAY_ADDRESS": env["GCS_ADDRESS"]})
    assert done.returncode == 0, done.stdout + done.stderr  # loopback: a warning
    assert "warn  dashboard" in done.stdout
    assert "answers without a token" in done.stdout
    assert "RAY_AUTH_MODE is disabled" in done.stdout
    assert "2 CPUs, 1 GPUs" in done.stdout
    assert "2 CPUs per GPU" in done.stdout
    assert "the same on 1 nodes: python 3." in done.stdout


@pytest.mark.ray
def test_a_dashboard_that_asks_for_a_token() -> None:
    token = secrets.token_hex(32)
    with start_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as env:
        done = run_doctor({k: v for k, v in env.items() if k != "RAY_ADDRESS"})
        assert "ok    dashboard" in done.stdout, done.stdout + done.stderr
        assert "asks for a token" in done.stdout
        assert "RAY_AUTH_MODE=token" in done.stdout
        assert token not in done.stdout + done.stderr


def test_a_cluster_that_cannot_be_joined_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("InvalidAuthToken\nmore")

    monkeypatch.setattr(doctor.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(doctor.ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = list(doctor.check_cluster("http://127.0.0.1:9"))[-1]
    assert (found.level, found.subject) == ("fail", "nodes")
    assert found.text.endswith("InvalidAuthToken")


def test_no_cluster_is_joined_that_was_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**settings: Any) -> None:
        raise AssertionError("joined some cluster")

    monkeypatch.setattr(doctor.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(doctor.ray, "init", never)
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    found = list(doctor.check_cluster())[-1]
    assert (found.level, found.text) == ("warn", "not asked: RAY_ADDRESS is not set")


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """A web server that answers every GET with `how["status"]`, and notes the headers it was sent."""
    how: dict[str, Any] = {"status": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 (the name is http.server's)
            how["headers"], how["path"] = dict(self.headers), self.path
            self.send_response(how["status"])
            if how["status"] == 302:
                self.send_header("Location", "/login")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", how
        web.shutdown()


@pytest.mark.parametrize("status", [200, 401, 403, 404, 500, 302])
def test_the_probe_sends_no_token_and_follows_no_redirect(server: tuple[str, dict[str, Any]], status: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    url, how = server
    how["status"] = status
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret")
    assert doctor.probe(url) == status
    assert how["path"] == "/api/jobs/"
    assert "a-secret" not in str(how["headers"])


def test_a_dashboard_that_is_not_there() -> None:
    answer = doctor.probe("http://127.0.0.1:9")
    assert isinstance(answer, str)
    assert doctor.check_dashboard("http://127.0.0.1:9", answer, named=True).level == "warn"
    assert doctor.check_dashboard("http://127.0.0.1:9", answer, named=False).level == "ok"


@pytest.mark.parametrize(("url", "answer", "level"), [
    ("http://192.0.2.7:8265", 200, "fail"), ("http://[2001:db8::1]:8265", 200, "fail"),
    ("http://no-such-host.invalid:8265", 200, "fail"), ("http://localhost:8265", 200, "warn"),
    ("http://[::1]:8265", 200, "warn"), ("http://192.0.2.7:8265", 401, "ok"), ("http://192.0.2.7:8265", 403, "ok"),
    ("http://192.0.2.7:8265", 302, "warn")])
def test_what_an_answer_without_a_token_means(url: str, answer: int, level: str) -> None:
    found = doctor.check_dashboard(url, answer, named=True)
    assert found.level == level
    assert ("CVE-2023-48022" in found.advice) == (level == "fail")


@pytest.mark.parametrize("address", ["foo", "file:///etc/passwd", "ftp://h:1", "http://"])
def test_what_is_no_dashboard_is_refused(address: str) -> None:
    with pytest.raises(BadRequest, match="dashboard"):
        list(doctor.check_cluster(address))


def test_ray_ports_that_are_open_on_all_addresses() -> None:
    found = list(doctor.check_ports([("0.0.0.0", 6379), ("::", 10001), ("127.0.0.1", 8265), ("0.0.0.0", 22)]))
    assert [f.level for f in found] == ["warn", "warn"]
    assert "6379" in found[0].text and "10001" in found[1].text
    assert [f.level for f in doctor.check_ports([("0.0.0.0", 22)])] == ["ok"]
    assert list(doctor.check_ports([("127.0.0.1", 6379)])) == []


def node(address: str, **resources: float) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "NodeID": "a" * 56, "Alive": True, "Resources": {"memory": 1e9} | resources}


def test_nodes_with_few_cores_per_gpu() -> None:
    head = node("10.0.0.1", **{"node:__internal_head__": 1})
    few, good, cpu = node("10.0.0.2", CPU=4, GPU=1), node("10.0.0.3", CPU=16, GPU=2), node("10.0.0.4", CPU=2)
    assert [f.level for f in doctor.check_nodes([head, few, good, cpu])] == ["ok", "warn", "ok", "ok"]
    found = list(doctor.check_nodes([head]))
    assert "(head)" in found[0].subject
    assert "none that works now" in found[1].text


def test_versions_that_differ_and_nodes_that_do_not_answer() -> None:
    same = {"python": "3.11.7", "ray": "2.60.0"}
    assert [f.level for f in doctor.check_node_versions({"a": same, "b": same})] == ["ok"]
    found = list(doctor.check_node_versions({"a": same, "b": same | {"ray": "2.59.0"}, "c": {"error": "TimeoutError: none"}}))
    assert [f.level for f in found] == ["fail", "fail"]
    assert "c ran no task" in found[0].text
    assert "ray differs: 2.59.0 on b; 2.60.0 on a" in found[1].text


@pytest.mark.ray
def test_a_node_that_is_gone_is_told(local_ray: None) -> None:
    import ray

    there = ray.nodes()
    answers = doctor.ask_nodes([*there, node("10.9.9.9")])
    assert len(answers) == len(there) + 1
    assert "error" in answers["10.9.9.9/aaaaaaaa"]
    assert sum("error" in facts for facts in answers.values()) == 1
