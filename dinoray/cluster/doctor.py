"""Checks of a Ray cluster: who can reach it, what its nodes are, and whether they run the same versions.

Whoever reaches a dashboard without a token can run code on the cluster: that is what Ray's job server is for
(CVE-2023-48022, "ShadowRay"). Ray leaves that open unless RAY_AUTH_MODE=token is set on every node.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinoray.doctor.findings import Finding, size
from dinoray.errors import BadRequest

LOCAL_DASHBOARD = "http://127.0.0.1:8265"
GOOD_CORES_PER_GPU = 8
"""Below, decoding starves the GPU (Ray's own benchmark: 4 cores per GPU took four times as long as 32)."""
PORTS = {6379: "GCS", 8265: "dashboard", 10001: "Ray client"}
TIMEOUT_S = 60
ON_THE_CLUSTER = "run it on the cluster: ray exec cluster.yaml 'RAY_ADDRESS=auto dinoray doctor cluster'"
TOKEN_ADVICE = ("set RAY_AUTH_MODE=token on every node, let nobody but SSH in (ray dashboard makes the tunnel), and take "
                "the cluster for compromised if it was open to the internet: CVE-2023-48022, ShadowRay")


def check_cluster(address: str | None = None) -> Iterator[Finding]:
    """All checks; `address` is the dashboard's URL. Nodes are asked where RAY_ADDRESS names the cluster.

    Raises BadRequest when `address` is no http URL.
    """
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    url = (given or LOCAL_DASHBOARD).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRequest(f"not the address of a dashboard: {url!r}", where="--address", todo="write http://HOST:8265")
    yield check_dashboard(url, probe(url), named=given is not None)
    try:
        listening = [(c.laddr.ip, c.laddr.port) for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        yield from check_ports(listening)
    except psutil.AccessDenied:  # macOS shows them to the administrator only
        yield Finding("warn", "ports", "this system does not say what listens here", "look with `sudo lsof -iTCP -sTCP:LISTEN`")
    yield check_auth_mode(os.environ.get("RAY_AUTH_MODE"))
    yield from _nodes()


def probe(url: str) -> int | str:
    """The HTTP status of the job list asked for without a token, or why there was no answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        with opener.open(f"{url}/api/jobs/", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:  # URLError, time-outs, refused connections
        return str(getattr(error, "reason", error))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """A redirect is an answer: it leads to a login page more often than not."""


def check_dashboard(url: str, answer: int | str, *, named: bool) -> Finding:
    """What `probe(url)` means. `named`: the user asked for this address, so silence is worth a warning."""
    loopback = is_loopback(urlsplit(url).hostname or "")
    if isinstance(answer, str):
        return Finding("warn" if named else "ok", "dashboard", f"{url} does not answer ({answer})",
                       "check the address, or open the tunnel: ray dashboard cluster.yaml" if named else "")
    if answer in (401, 403):
        return Finding("ok", "dashboard", f"{url} asks for a token")
    if answer != 200:
        return Finding("warn", "dashboard", f"{url} answers {answer} to a request without a token: not a Ray dashboard, or "
                       "one behind a proxy", "check that the proxy lets nobody in without a login")
    if loopback:
        return Finding("warn", "dashboard", f"{url} answers without a token: everybody with a login here, or at the other end "
                       "of the tunnel, can run code on the cluster", "set RAY_AUTH_MODE=token on every node")
    return Finding("fail", "dashboard", f"{url} answers without a token: whoever reaches it can run code on the cluster",
                   TOKEN_ADVICE)


def is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own loopback."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:  # a name that cannot be resolved is not ours
        return False
    return all(ipaddress.ip_address(text.partition("%")[0]).is_loopback for text in found)


def check_ports(listening: list[tuple[str, int]]) -> Iterator[Finding]:
    """(address, port) that this machine listens on: Ray's own ports on all addresses."""
    for port, name in PORTS.items():
        if any(found == port and ipaddress.ip_address(ip).is_unspecified for ip, found in listening):
            yield Finding("warn", "ports", f"the {name} port {port} is open on all addresses of this machine",
                          "let a firewall or security group pass SSH only; the nodes' own group may talk freely")
    if not any(found in PORTS for _, found in listening):
        yield Finding("ok", "ports", f"nothing listens on {', '.join(map(str, PORTS))} here")


def check_auth_mode(mode: str | None) -> Finding:
    """RAY_AUTH_MODE of this environment."""
    if mode == "token":
        return Finding("ok", "token", "RAY_AUTH_MODE=token")
    return Finding("warn", "token", f"RAY_AUTH_MODE is {mode or 'not set'}: clusters started here let everybody in",
                   "export RAY_AUTH_MODE=token on every node and client (ray get-auth-token --generate makes the token)")


def _nodes() -> Iterator[Finding]:
    """Ask the nodes themselves, by joining as a driver; only the cluster that the environment names, never just any."""
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID")):
        yield Finding("warn", "nodes", "not asked: RAY_ADDRESS is not set", ON_THE_CLUSTER)
        return
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # what ray.init raises has no common base
        yield Finding("fail", "nodes", f"RAY_ADDRESS cannot be joined: {_first_line(error)}", ON_THE_CLUSTER)
        return
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        yield from check_nodes(alive)
        yield from check_node_versions(ask_nodes(alive))
    finally:
        if ours:
            ray.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_nodes(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    """`ray.nodes()` as lines: resources of each, and cores per GPU."""
    for node in nodes:
        have = node["Resources"]
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
        store = size(have.get("object_store_memory", 0))
        text = f"{cpus:g} CPUs, {gpus:g} GPUs, {size(have.get('memory', 0))} memory, {store} object store"
        subject = f"node {node.get('NodeManagerAddress', '?')}" + (" (head)" if "node:__internal_head__" in have else "")
        if gpus and cpus / gpus < GOOD_CORES_PER_GPU:
            yield Finding("warn", subject, f"{text}: {cpus / gpus:g} CPUs per GPU",
                          f"use instances with {GOOD_CORES_PER_GPU} or more vCPU per GPU: decoding starves the GPU")
        else:
            yield Finding("ok", subject, text)
    if not any(node["Resources"].get("CPU", 0) or node["Resources"].get("GPU", 0) for node in nodes):
        yield Finding("ok", "nodes", "none that works now: an autoscaling cluster adds them for --workers MIN,MAX")


def ask_nodes(nodes: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Versions on each node, by one small task there: {node: {package: version}}; `error` where a task failed."""

    def versions() -> dict[str, str]:  # local, so that it travels by value: a node may lack dinoray
        import platform
        from importlib import metadata

        found = {"python": platform.python_version()}
        for name in ("ray", "torch", "dinoray"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "missing"
        return found

    task = ray.remote(num_cpus=0, max_retries=0)(versions)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[f"{node.get('NodeManagerAddress', '?')}/{node['NodeID'][:8]}"] = task.options(scheduling_strategy=there).remote()
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=TIMEOUT_S)
    answers = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=0.1)
        except ray.exceptions.RayError as error:
            answers[name] = {"error": f"{type(error).__name__}: {_first_line(error)}"}
    return answers


def check_node_versions(answers: dict[str, dict[str, str]]) -> Iterator[Finding]:
    """Whether all nodes gave the same versions."""
    silent = {name: facts["error"] for name, facts in answers.items() if "error" in facts}
    for name, error in silent.items():
        yield Finding("fail", "versions", f"{name} ran no task: {error}", "look at that node's log, or remove it")
    spread: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, facts in answers.items():
        for package, version in facts.items() if name not in silent else ():
            spread[package][version].append(name)
    different = {package: found for package, found in spread.items() if len(found) > 1}
    for package, found in different.items():
        text = "; ".join(f"{version} on {', '.join(names)}" for version, names in sorted(found.items()))
        yield Finding("fail", "versions", f"{package} differs: {text}", "install the same constraints.txt on all nodes")
    if spread and not different:
        same = ", ".join(f"{package} {next(iter(found))}" for package, found in spread.items())
        yield Finding("ok", "versions", f"the same on {len(answers) - len(silent)} nodes: {same}")
