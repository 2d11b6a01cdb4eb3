"""An HTTP proxy before a real S3 server (moto) that does to requests what networks and busy stores do.

Faults are chosen by rules: a rule names a fault, which requests it may hit, and when (each n-th, from request N on, by
seeded chance). A request is numbered in the order of arrival. Threads and stdlib only; nothing but 127.0.0.1.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

ANSWERS = {  # fault -> status, S3's code, its message
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "bad_key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "bad_range": (416, "InvalidRange", "The requested range is not satisfiable"),
    "not_implemented": (501, "NotImplemented", "A header you provided implies functionality that is not implemented."),
}
FAULTS = (*ANSWERS, "reset", "stall", "truncate", "lost_answer", "latency", "ignore_condition")


@dataclass
class Request:
    """What a rule sees."""

    number: int
    method: str
    path: str
    headers: dict[str, str]

    @property
    def signed(self) -> bool:
        """Whether it carries credentials."""
        return "authorization" in self.headers

    @property
    def conditional(self) -> bool:
        """Whether it is a put-if-absent."""
        return "if-none-match" in self.headers


@dataclass
class Rule:
    """`fault` hits requests for which `when` holds: by chance `share` (seeded), at most `most` times."""

    fault: str
    when: Callable[[Request], bool] = lambda request: True
    share: float = 1.0
    most: int | None = None
    seconds: float = 0.0
    """Of `latency` and `stall`."""
    hits: int = 0


@dataclass
class Proxy:
    """A running proxy: change `rules` at any time; `seen` are all requests, `hits` counts faults by name."""

    url: str
    upstream: str
    rules: list[Rule] = field(default_factory=list)
    seed: int = 0
    seen: list[Request] = field(default_factory=list)
    hits: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    most_per_path: int | None = None
    """No request (by method and path) meets more faults than this: with it, no call can run out of tries by bad luck."""

    def __post_init__(self):
        self.reseed()

    def reseed(self) -> None:
        """Start the chances anew."""
        self._random = random.Random(self.seed)
        self._met: dict[tuple[str, str], int] = {}

    def note(self, method: str, path: str, headers: dict[str, str]) -> tuple[Request, Rule | None]:
        """Number a request and choose what happens to it."""
        with self.lock:
            request = Request(len(self.seen), method, path, headers)
            self.seen.append(request)
            met = self._met.get((method, path), 0)
            for rule in self.rules if self.most_per_path is None or met < self.most_per_path else ():
                if (rule.most is None or rule.hits < rule.most) and rule.when(request) and self._random.random() < rule.share:
                    rule.hits += 1
                    self._met[method, path] = met + 1
                    self.hits[rule.fault] = self.hits.get(rule.fault, 0) + 1
                    return request, rule
        return request, None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def handle_any(self) -> None:
        """One request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        _, rule = self.proxy.note(self.command, self.path, headers)
        fault = rule.fault if rule else None
        if fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.answer(status, {"Content-Type": "application/xml"}, text)
            return
        if fault == "latency":
            time.sleep(rule.seconds)
        if fault == "reset":
            self.reset()
            return
        if fault == "ignore_condition":
            headers.pop("if-none-match", None)
        status, answered, data = self.forward(headers, body)
        if fault == "lost_answer":  # the store did it, and nobody hears of it
            self.reset()
        elif fault in ("truncate", "stall") and data and self.command == "GET":
            self.send_head(status, answered, len(data))
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(rule.seconds)
            self.close_connection = True
        else:
            self.answer(status, answered, data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    def forward(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Ask the real server."""
        connection = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=30)
        try:
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            data = response.read()
            kept = {k: v for k, v in response.getheaders() if k.lower() not in
                    ("connection", "transfer-encoding", "content-length", "server", "date")}
            if self.command == "HEAD":
                kept["Content-Length"] = response.getheader("Content-Length") or "0"
            return response.status, kept, data
        finally:
            connection.close()

    def send_head(self, status: int, headers: dict[str, str], length: int) -> None:
        """Status line and headers."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        """A whole answer."""
        self.send_head(status, headers, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def reset(self) -> None:
        """Close the connection so that the other side gets RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile.close()

    def finish(self) -> None:
        """As the base class, but a connection that was reset cannot be flushed."""
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that were reset close their side in many ways; that is what this server is for."""


@contextmanager
def s3_proxy(upstream: str, *rules: Rule, seed: int = 0) -> Iterator[Proxy]:
    """A proxy before the server at `upstream` (http://host:port)."""
    proxy = Proxy("", upstream, list(rules), seed)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def moto_server() -> Iterator[str]:
    """moto's S3 on 127.0.0.1; its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def aws_environment(url: str) -> dict[str, str]:
    """The variables of a client with (dummy) credentials at `url`, and of nothing else on this machine."""
    return {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "secret-that-must-not-leak",
            "AWS_DEFAULT_REGION": "us-east-1", **NO_OTHER_CREDENTIALS}


@contextmanager
def filled_bucket(name: str, folder: Path, prefix: str) -> Iterator[dict[str, str]]:
    """An S3 with bucket `name` that holds the files of `folder` under `prefix`/; the variables that its clients need."""
    import boto3
    import fsspec

    with moto_server() as url:
        variables = aws_environment(url)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
        client.create_bucket(Bucket=name)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            client.upload_file(str(path), name, f"{prefix}/{path.relative_to(folder).as_posix()}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            yield variables
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()


NO_OTHER_CREDENTIALS = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
                        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
