"""A store on S3 over real HTTP (moto behind a proxy that injects faults): what is retried, what stops, what is counted."""

from __future__ import annotations

import functools
import http.server
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
import tifffile

from dinoray.errors import BadRequest, DinorayError, ItemError, SystemicError, TransientError
from dinoray.io import retries, s3
from dinoray.io.images import load_item
from dinoray.io.items import Item
from dinoray.io.probe import probe_storage
from dinoray.io.retries import TRIES, RetryCount, counting
from dinoray.io.sources import list_items
from dinoray.io.stores import open_store, read_bytes
from tests.conftest import texture
from tests.faults.s3_proxy import NO_OTHER_CREDENTIALS, Proxy, Request, Rule, aws_environment, moto_server, s3_proxy


@pytest.fixture(scope="module")
def served() -> Iterator[Proxy]:
    """moto and the proxy before it; `client` speaks to moto directly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")  # pages of a listing
        with moto_server() as upstream, s3_proxy(upstream) as running:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in aws_environment(running.url).items():
                patch.setenv(name, value)
            running.client = boto3.client("s3", endpoint_url=upstream)  # type: ignore[attr-defined]
            yield running


@pytest.fixture
def proxy(served: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The proxy without rules, credentials in the environment, an empty bucket, and retries that hardly wait."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "LONGEST_WAIT_S", 0.01)
    for memory in (s3._public, s3._told):
        memory.clear()
    served.rules, served.hits, served.most_per_path = [], {}, None
    served.reseed()
    served.bucket = f"b{uuid.uuid4().hex}"  # type: ignore[attr-defined]
    served.client.create_bucket(Bucket=served.bucket)  # type: ignore[attr-defined]
    served.seen.clear()
    return served


def calls(store) -> dict[str, Callable[[], object]]:
    """Every method, on an object that exists and one that does not."""
    return {
        "get": lambda: store.get("d/a"), "exists": lambda: store.exists("d/a"), "list": lambda: sorted(store.list("d")),
        "open": lambda: store.open("d/a").read(), "read_bytes": lambda: read_bytes(f"{store.url}/d/a"),
        "put": lambda: store.put("d/new", b"new"), "put_if_absent": lambda: store.put_if_absent("d/once", b"x"),
        "delete": lambda: store.delete("d/b"),
    }


EXPECTED = {"get": b"abc" * 100, "exists": True, "put_if_absent": True, "list": [("d/a", 300), ("d/b", 1)], "open": b"abc" * 100,
            "read_bytes": b"abc" * 100}


def filled(proxy: Proxy):
    """A store with two objects; what it tries out once is done."""
    store = open_store(f"s3://{proxy.bucket}/out")
    store.put("d/a", b"abc" * 100)
    store.put("d/b", b"1")
    assert store.has_put_if_absent
    proxy.seen.clear()
    return store


@pytest.mark.parametrize(("fault", "kind"), [("slow_down", "throttled"), ("internal", "server_error"), ("reset", "connection"),
                                             ("lost_answer", "connection")])
def test_every_method_survives_what_passes_and_counts_it(proxy: Proxy, fault: str, kind: str) -> None:
    store = filled(proxy)
    for method, call in calls(store).items():
        proxy.rules = [Rule(fault, most=3)]
        with counting(RetryCount()) as count:
            assert call() == EXPECTED.get(method), method
        assert count.as_dict()[kind] == count.total == 3 == proxy.rules[0].hits, method
    assert store.get("d/new") == b"new" and store.get("d/once") == b"x" and not store.exists("d/b")


@pytest.mark.parametrize(("fault", "kind"), [("truncate", "truncated"), ("stall", "timeout")])
def test_bodies_that_end_early_or_stall_are_read_again(proxy: Proxy, monkeypatch, fault: str, kind: str) -> None:
    filled(proxy)
    monkeypatch.setattr(s3, "SILENCE_S", 0.5)
    store = open_store(f"s3://{proxy.bucket}/out")
    for method in ("get", "open", "read_bytes"):
        proxy.rules = [Rule(fault, lambda r: r.method == "GET" and "/d/a" in r.path, most=2, seconds=1.0)]
        with counting(RetryCount()) as count:
            assert calls(store)[method]() == EXPECTED[method]
        assert count.as_dict()[kind] >= 2, method


def test_retries_are_bounded(proxy: Proxy) -> None:
    store = filled(proxy)
    proxy.rules = [Rule("slow_down")]
    for method, call in calls(store).items():
        proxy.seen.clear()
        with counting(RetryCount()) as count, pytest.raises(TransientError, match="SlowDown|503") as caught:
            call()
        assert len(proxy.seen) == TRIES and count.total == TRIES - 1, method
        assert proxy.bucket in caught.value.where


@pytest.mark.parametrize(("fault", "words"), [("expired", "have expired"), ("denied", "credentials"), ("bad_key", "not valid")])
def test_refused_credentials_stop_at_once_and_say_what_to_do(proxy: Proxy, fault: str, words: str) -> None:
    store = filled(proxy)
    proxy.rules = [Rule(fault)]
    for method, call in calls(store).items():
        proxy.seen.clear()
        with counting(RetryCount()) as count, pytest.raises(SystemicError) as caught:
            call()
        assert count.total == 0 and len(proxy.seen) <= 3, method
        assert words in caught.value.todo or method == "open", caught.value  # asks with HEAD, whose answer has no body
        assert "AWS_ACCESS_KEY_ID" in caught.value.todo and "run the same command again" in caught.value.todo
        assert "secret-that-must-not-leak" not in str(caught.value)


def test_every_page_of_a_listing_has_tries_of_its_own(proxy: Proxy) -> None:
    store = open_store(f"s3://{proxy.bucket}/out")
    keys = {f"r/{i:03d}.json" for i in range(60)}
    for key in keys:
        proxy.client.put_object(Bucket=proxy.bucket, Key=f"out/{key}", Body=b"1")
    proxy.rules = [Rule("slow_down", lambda request: request.number % 4 != 3)]  # up to three of four tries of each page
    with counting(RetryCount()) as count:
        assert dict(store.list("r")) == dict.fromkeys(keys, 1)
    assert count.as_dict()["throttled"] == proxy.hits["slow_down"] > 2 * TRIES


def test_threads_on_a_store_that_does_everything_wrong(proxy: Proxy, monkeypatch) -> None:
    monkeypatch.setattr(s3, "SILENCE_S", 1.0)
    store = filled(proxy)
    proxy.most_per_path = 2
    proxy.rules = [Rule(fault, share=0.07, seconds=1.5 if fault == "stall" else 0.01, most=4 if fault == "stall" else None)
                   for fault in ("slow_down", "internal", "reset", "lost_answer", "truncate", "stall", "latency")]
    counts = RetryCount()

    def work(thread: int) -> list[bool]:
        with counting(counts):
            won = []
            for i in range(10):
                key = f"t/{thread}-{i}"
                store.put(key, key.encode() * 50)
                assert store.get(key) == key.encode() * 50
                assert store.exists(key)
                won.append(store.put_if_absent(f"race/{i}", f"{thread}".encode() * 9))
            return won

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(work, range(6)))
    for i in range(10):
        winners = [thread for thread in range(6) if won[thread][i]]
        assert len(winners) == 1 and store.get(f"race/{i}") == f"{winners[0]}".encode() * 9
    assert counts.total > 20 and sum(proxy.hits.values()) > 20


# ---------------------------------------------------------------- put if absent


@pytest.mark.parametrize("fault", ["not_implemented", "ignore_condition"])
def test_a_store_without_conditional_put_is_found_out_and_said_once(proxy: Proxy, fault: str, caplog) -> None:
    proxy.rules = [Rule(fault, lambda r: r.conditional)]
    store = open_store(f"s3://{proxy.bucket}/out")
    with caplog.at_level(logging.WARNING):
        assert store.put_if_absent("k", b"first")
        assert not store.put_if_absent("k", b"second")
        assert not open_store(store.url).put_if_absent("k", b"third")
    assert store.get("k") == b"first" and not store.has_put_if_absent
    assert sum("conditional put" in record.message for record in caplog.records) == 1
    assert dict(store.list()) == {"k": 5}
    assert probe_storage(store.url).put_if_absent is False


def test_without_conditional_put_the_threads_of_one_process_still_have_one_winner(proxy: Proxy) -> None:
    proxy.rules = [Rule("not_implemented", lambda r: r.conditional)]
    store = open_store(f"s3://{proxy.bucket}/out")
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda n: store.put_if_absent("k", b"%d" % n), range(6)))
    assert sum(won) == 1 and store.get("k") == b"%d" % won.index(True)


def test_a_creation_whose_answer_was_lost_is_ours(proxy: Proxy) -> None:
    store = filled(proxy)
    proxy.rules = [Rule("lost_answer", most=2)]
    assert store.put_if_absent("k", b"mine")
    proxy.rules = [Rule("lost_answer", most=1)]
    assert not store.put_if_absent("k", b"other")
    assert store.get("k") == b"mine"


# ---------------------------------------------------------------- without credentials


def public_bucket(proxy: Proxy, name: str = "") -> str:
    bucket = name or f"p{uuid.uuid4().hex}"
    proxy.client.create_bucket(Bucket=bucket, ACL="public-read")
    tifffile.imwrite(path := f"/tmp/{bucket}.tif", texture((32, 32), 1, "uint16"), photometric="minisblack")
    proxy.client.put_object(Bucket=bucket, Key="in/a.tif", Body=Path(path).read_bytes(), ACL="public-read")
    os.unlink(path)
    return bucket


@pytest.fixture
def no_credentials(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in NO_OTHER_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return proxy


def test_a_public_bucket_is_read_without_credentials_and_that_is_said_once(no_credentials: Proxy, caplog) -> None:
    bucket = public_bucket(no_credentials)
    with caplog.at_level(logging.WARNING):
        (item,) = list_items([f"s3://{bucket}/in"]).items
        assert load_item(item).image.pixels.shape == (1, 32, 32)
    assert no_credentials.seen and not any(request.signed for request in no_credentials.seen)
    assert [r.message for r in caplog.records if "anonymously" in r.message] == [
        f"no S3 credentials were found: s3://{bucket} is read anonymously"]


def test_writing_without_credentials_is_refused_before_a_request(no_credentials: Proxy) -> None:
    store = open_store(f"s3://{no_credentials.bucket}/out")
    for call in (lambda: store.put("k", b"1"), lambda: store.put_if_absent("k", b"1"), lambda: store.delete("k"),
                 lambda: probe_storage(store.url)):
        with pytest.raises(SystemicError, match="writing to S3 needs credentials") as caught:
            call()
        assert "AWS_ACCESS_KEY_ID" in caught.value.todo and "AWS_PROFILE" in caught.value.todo
    assert not no_credentials.seen


def test_a_private_bucket_without_credentials_is_a_bad_request_that_says_so(no_credentials: Proxy) -> None:
    no_credentials.rules = [Rule("denied", lambda r: not r.signed)]
    with pytest.raises(BadRequest, match="access denied") as caught:
        list(list_items([f"s3://{no_credentials.bucket}/in"]).items)
    assert "credentials" in caught.value.todo


def test_anonymous_reading_can_be_asked_for_and_writing_is_signed(proxy: Proxy, monkeypatch) -> None:
    import fsspec

    bucket = public_bucket(proxy)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "true"})  # FSSPEC_S3_ANON=true, read when fsspec is imported
    (item,) = list_items([f"s3://{bucket}/in"]).items
    load_item(item)
    assert proxy.seen and not any(request.signed for request in proxy.seen)
    open_store(f"s3://{proxy.bucket}/out").put("k", b"1")
    assert proxy.seen[-1].signed
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "false"})
    list_items([f"s3://{bucket}/in"])
    assert proxy.seen[-1].signed


def test_a_public_bucket_that_refuses_our_credentials_is_read_without_while_we_write_with(proxy: Proxy, caplog) -> None:
    bucket = public_bucket(proxy)
    proxy.rules = [Rule("denied", lambda r: r.signed and bucket in r.path)]
    store = open_store(f"s3://{proxy.bucket}/out")
    with caplog.at_level(logging.WARNING):
        (item,) = list_items([f"s3://{bucket}/in"]).items
        store.put("k", b"1")
        load_item(item)
        load_item(item)
    assert sum("refuses the credentials and is public" in r.message for r in caplog.records) == 1
    assert proxy.hits["denied"] <= 2, "asked again and again with credentials that it refuses"
    assert [r.signed for r in proxy.seen if r.method == "PUT"] == [True]


# ---------------------------------------------------------------- inputs


def an_item(proxy: Proxy) -> Item:
    tifffile.imwrite(path := f"/tmp/{proxy.bucket}.tif", texture((32, 32), 2, "uint16"), photometric="minisblack")
    proxy.client.put_object(Bucket=proxy.bucket, Key="in/a.tif", Body=Path(path).read_bytes())
    os.unlink(path)
    (item,) = list_items([f"s3://{proxy.bucket}/in"]).items
    proxy.seen.clear()
    return item


def test_an_input_costs_one_request(proxy: Proxy) -> None:
    item = an_item(proxy)
    load_item(item)
    assert [(r.method, r.path) for r in proxy.seen] == [("GET", f"/{proxy.bucket}/in/a.tif")]


def test_an_object_replaced_by_one_of_equal_size_is_changed(proxy: Proxy) -> None:
    item = an_item(proxy)
    data = bytearray(proxy.client.get_object(Bucket=proxy.bucket, Key="in/a.tif")["Body"].read())
    data[-1] ^= 255
    proxy.client.put_object(Bucket=proxy.bucket, Key="in/a.tif", Body=bytes(data))
    with pytest.raises(ItemError) as caught:
        load_item(item)
    assert caught.value.reason == "changed"
    proxy.client.delete_object(Bucket=proxy.bucket, Key="in/a.tif")
    with pytest.raises(ItemError) as caught:
        load_item(item)
    assert caught.value.reason == "missing"


@pytest.mark.parametrize("fault", ["truncate", "reset", "slow_down", "internal"])
def test_an_input_that_cannot_be_read_for_now_is_never_quarantined(proxy: Proxy, fault: str) -> None:
    item = an_item(proxy)
    proxy.rules = [Rule(fault)]
    with counting(RetryCount()) as count, pytest.raises(TransientError):
        load_item(item)
    assert count.total == TRIES - 1 and len(proxy.seen) == TRIES
    proxy.rules = []
    load_item(item)


def test_denied_inputs_are_systemic(proxy: Proxy) -> None:
    item = an_item(proxy)
    proxy.rules = [Rule("expired")]
    with pytest.raises(SystemicError, match="ExpiredToken"):
        load_item(item)


# ---------------------------------------------------------------- web servers


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path, list[int]]]:
    """A web server with an ETag per file: (its URL, its folder, statuses it answers first)."""
    answers: list[int] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            if answers:
                self.send_error(answers.pop(0))
            else:
                super().do_GET()

        def do_HEAD(self) -> None:
            self.do_GET() if answers else super().do_HEAD()

        def end_headers(self) -> None:
            path = Path(self.translate_path(self.path))
            if path.is_file():
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    tifffile.imwrite(tmp_path / "a.tif", texture((32, 32), 3, "uint16"), photometric="minisblack")
    yield f"http://127.0.0.1:{server.server_port}/a.tif", tmp_path, answers
    server.shutdown()
    server.server_close()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "LONGEST_WAIT_S", 0.002)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)


def test_web_inputs_are_retried_and_told_when_changed(web, fast) -> None:
    url, folder, answers = web
    (item,) = list_items([url]).items
    answers += [503, 500, 429]
    with counting(RetryCount()) as count:
        assert load_item(item).image.pixels.shape == (1, 32, 32)
    assert count.as_dict()["throttled"] == 2 and count.as_dict()["server_error"] == 1
    os.utime(folder / "a.tif", ns=(1, 1))
    with pytest.raises(ItemError, match="changed|not the one") as caught:
        load_item(item)
    assert caught.value.reason == "changed"


@pytest.mark.parametrize(("statuses", "kind", "reason"), [
    ([404] * 3, ItemError, "missing"), ([403] * 3, SystemicError, None), ([503] * 40, TransientError, None)])
def test_web_answers_have_their_classes(web, fast, statuses: list[int], kind: type[DinorayError], reason: str | None) -> None:
    url, _, answers = web
    (item,) = list_items([url]).items
    answers += statuses
    with pytest.raises(kind) as caught:
        load_item(item)
    assert getattr(caught.value, "reason", None) == reason


def test_a_web_server_that_refuses_the_connection_is_transient_not_missing(fast) -> None:
    url = "http://127.0.0.1:9/a.tif"
    with counting(RetryCount()) as count, pytest.raises(TransientError):
        list_items([url])
    assert count.as_dict()["connection"] == TRIES - 1


def test_rules_see_what_they_should() -> None:
    """The proxy's own parts."""
    request = Request(0, "PUT", "/b/k", {"if-none-match": "*", "authorization": "AWS4"})
    assert request.conditional and request.signed
    first, second = Proxy("", "", [Rule("reset", share=0.5)], seed=3), Proxy("", "", [Rule("reset", share=0.5)], seed=3)
    for one in (first, second):
        for _ in range(50):
            one.note("GET", "/", {})
    assert first.hits == second.hits and 10 < first.hits["reset"] < 40


def test_probe_of_s3_that_behaves(proxy: Proxy) -> None:
    facts = probe_storage(f"s3://{proxy.bucket}/out")
    assert facts.protocol == "s3" and facts.free_bytes is None
    assert facts.atomic_put and facts.put_if_absent and facts.read_after_write and facts.list_after_write
    assert not list(open_store(f"s3://{proxy.bucket}").list())
