"""Retries: which trouble is tried again, how often, how long it waits, where it is counted, and what is raised at last."""

from __future__ import annotations

import asyncio
import errno
import io
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import fsspec
import pytest
from botocore import exceptions as boto
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from s3fs.errors import translate_boto_error
from yarl import URL

from dinoray.errors import BadRequest, ItemError, SystemicError, TransientError
from dinoray.io import retries
from dinoray.io.retries import TRIES, RetriedFile, RetryCount, counting, retried, retried_async, wait_ceiling_s
from dinoray.io.storage_errors import classify, describe, listing_errors, storage_errors, store_errors
from dinoray.io.stores import FsspecStore


def s3_error(code: str, status: int, **headers: str) -> Exception:
    """What s3fs raises when S3 answers this."""
    response = {"Error": {"Code": code, "Message": "said the store"},
                "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}
    return translate_boto_error(boto.ClientError(response, "GetObject"))


def http_error(status: int, **headers: str) -> aiohttp.ClientResponseError:
    info = aiohttp.RequestInfo(URL("http://h/x"), "GET", {}, URL("http://h/x"))
    return aiohttp.ClientResponseError(info, (), status=status, message="said the server", headers=headers)


def not_found_because(error: Exception) -> FileNotFoundError:
    """What fsspec makes of every error of a web server."""
    try:
        raise FileNotFoundError("http://h/x") from error
    except FileNotFoundError as found:
        return found


REFUSED = aiohttp.ClientConnectorError(type("Key", (), {"ssl": None, "host": "h", "port": 80, "is_ssl": False})(),
                                       OSError(errno.ECONNREFUSED, "Connection refused"))

KINDS = [
    (s3_error("SlowDown", 503), "throttled"), (s3_error("503", 503), "throttled"), (s3_error("TooManyRequests", 429), "throttled"),
    (s3_error("RequestTimeout", 400), "timeout"), (s3_error("InternalError", 500), "server_error"),
    (s3_error("500", 500), "server_error"), (s3_error("502", 502), "server_error"), (s3_error("Odd", 504), "server_error"),
    (s3_error("ConditionalRequestConflict", 409), "server_error"), (s3_error("IncompleteBody", 400), "truncated"),
    (s3_error("NoSuchKey", 404), "missing"), (s3_error("404", 404), "missing"), (s3_error("NoSuchBucket", 404), "bucket"),
    (s3_error("InvalidBucketName", 400), "bucket"), (s3_error("AccessDenied", 403), "denied"), (s3_error("403", 403), "denied"),
    (s3_error("ExpiredToken", 400), "denied"), (s3_error("InvalidAccessKeyId", 403), "denied"),
    (s3_error("SignatureDoesNotMatch", 403), "denied"), (s3_error("RequestTimeTooSkewed", 403), "denied"),
    (s3_error("PreconditionFailed", 412), "exists"), (s3_error("NotImplemented", 501), "unsupported"),
    (s3_error("400", 400), "refused"), (s3_error("MethodNotAllowed", 405), "refused"),
    (boto.NoCredentialsError(), "denied"), (boto.ProfileNotFound(profile="x"), "denied"),
    (boto.EndpointConnectionError(endpoint_url="http://h"), "connection"),
    (boto.ConnectionClosedError(endpoint_url="http://h"), "connection"),
    (boto.ReadTimeoutError(endpoint_url="http://h"), "timeout"), (boto.ConnectTimeoutError(endpoint_url="http://h"), "timeout"),
    (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), "truncated"),
    (boto.ResponseStreamingError(error="cut"), "truncated"),
    (boto.ParamValidationError(report="Invalid bucket name"), "bucket"),
    (aiohttp.ClientPayloadError("cut"), "truncated"), (aiohttp.ServerDisconnectedError(), "connection"),
    (aiohttp.ServerTimeoutError(), "timeout"), (REFUSED, "connection"),
    (http_error(429), "throttled"), (http_error(503), "throttled"), (http_error(500), "server_error"), (http_error(403), "denied"),
    (http_error(404), "missing"), (http_error(410), "missing"), (http_error(418), "refused"),
    (not_found_because(REFUSED), "connection"), (not_found_because(http_error(503)), "throttled"),
    (not_found_because(http_error(403)), "denied"), (not_found_because(http_error(404)), "missing"),
    (not_found_because(KeyError("x")), "missing"), (FileNotFoundError("x"), "missing"), (NotADirectoryError("x"), "missing"),
    (IsADirectoryError("x"), "folder"), (FileExistsError("x"), "exists"), (PermissionError(errno.EACCES, "x"), "denied"),
    (fsspec.exceptions.FSTimeoutError(), "timeout"), (TimeoutError(), "timeout"), (ConnectionResetError("x"), "connection"),
    (BrokenPipeError("x"), "connection"), (OSError(errno.EIO, "x"), "server_error"), (OSError(errno.ESTALE, "x"), "server_error"),
    (OSError(errno.EAGAIN, "x"), "throttled"), (OSError(errno.ETIMEDOUT, "x"), "timeout"), (OSError(errno.ENOSPC, "x"), "full"),
    (OSError(errno.EDQUOT, "x"), "full"), (OSError(errno.EROFS, "x"), "full"), (OSError(errno.EFBIG, "x"), "full"),
    (OSError(errno.EMFILE, "x"), "refused"),
    (KeyError("x"), None), (ValueError("x"), None), (TypeError("x"), None), (TransientError("x"), None),
    (ItemError("decode", "x"), None),
]


@pytest.mark.parametrize(("error", "kind"), KINDS, ids=lambda value: repr(value)[:60])
def test_kinds_of_trouble(error: Exception, kind: str | None) -> None:
    assert classify(error) == kind


class Failing:
    """Raises `errors` one after the other, then returns 7."""

    def __init__(self, *errors: Exception):
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= len(self.errors):
            raise self.errors[self.calls - 1]
        return 7

    async def later(self) -> int:
        return self()


BOTH = pytest.mark.parametrize("run", [retried, lambda call, where: asyncio.run(retried_async(call.later, where))],
                               ids=["sync", "async"])


@BOTH
def test_transient_trouble_is_tried_again_and_counted(run, waits: list[float]) -> None:
    call = Failing(s3_error("SlowDown", 503), s3_error("500", 500), OSError(errno.EIO, "x"), TimeoutError(), ConnectionResetError())
    with counting(RetryCount()) as count:
        assert run(call, "s3://b/k") == 7
    assert call.calls == TRIES == 6
    assert count.as_dict() == {"throttled": 1, "server_error": 2, "timeout": 1, "connection": 1, "truncated": 0}
    assert count.total == 5 == len(waits)
    assert all(0 <= wait <= wait_ceiling_s(i) for i, wait in enumerate(waits, 1))


@BOTH
def test_the_last_try_ends_in_a_transient_error(run, waits: list[float]) -> None:
    call = Failing(*[s3_error("SlowDown", 503)] * 20)
    with counting(RetryCount()) as count, pytest.raises(TransientError) as caught:
        run(call, "https://h/x?X-Amz-Signature=topsecret")
    assert call.calls == TRIES and count.total == len(waits) == TRIES - 1
    assert "SlowDown" in str(caught.value) and "6 times" in str(caught.value) and "run the same command again" in caught.value.todo
    assert "topsecret" not in str(caught.value) and "https://h/x" in caught.value.where
    assert isinstance(caught.value.__cause__, OSError)


@BOTH
@pytest.mark.parametrize("error", [s3_error("ExpiredToken", 400), s3_error("NoSuchKey", 404), s3_error("PreconditionFailed", 412),
                                   OSError(errno.ENOSPC, "x"), KeyError("bug"), ItemError("changed", "x"), SystemicError("x")])
def test_what_does_not_pass_is_raised_at_once_as_it_is(run, waits: list[float], error: Exception) -> None:
    call = Failing(error)
    with counting(RetryCount()) as count, pytest.raises(type(error)) as caught:
        run(call, "x")
    assert caught.value is error and call.calls == 1 and count.total == 0 and not waits


def test_waits_grow_from_a_fifth_of_a_second_to_ten_and_have_full_jitter(waits: list[float]) -> None:
    ceilings = [wait_ceiling_s(i) for i in range(1, TRIES)]
    assert ceilings[0] == pytest.approx(0.2) and ceilings[-1] == pytest.approx(10.0) and ceilings == sorted(ceilings)
    assert wait_ceiling_s(50) == 10.0
    for _ in range(200):
        retried(Failing(TimeoutError()), "x")
    assert len(set(waits)) > 190 and min(waits) < 0.02 and 0.18 < max(waits) <= 0.2


@pytest.mark.parametrize(("said", "expected"), [("7", 7.0), ("3600", 10.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-5", None)])
def test_a_server_that_names_its_wait_is_listened_to_within_bounds(waits: list[float], said: str, expected: float | None) -> None:
    for error in (http_error(429, **{"Retry-After": said}), s3_error("SlowDown", 503, **{"retry-after": said})):
        retried(Failing(error), "x")
    assert all(wait == expected for wait in waits) if expected else all(wait <= 0.2 for wait in waits)


def test_a_retried_call_inside_a_retried_call_does_not_multiply() -> None:
    inner = Failing(*[TimeoutError()] * 100)
    with pytest.raises(TransientError):
        retried(lambda: retried(lambda: asyncio.run(retried_async(inner.later, "in")), "middle"), "out")
    assert inner.calls == TRIES


def test_counts_belong_to_the_thread_that_asked(waits: list[float]) -> None:
    before, barrier = retries.PROCESS.as_dict()["timeout"], threading.Barrier(3)

    def work(times: int) -> RetryCount | None:
        barrier.wait()
        if not times:
            retried(Failing(TimeoutError()), "x")
            return None
        with counting(RetryCount()) as count:
            for _ in range(times):
                retried(Failing(TimeoutError(), TimeoutError()), "x")
            with counting(RetryCount()) as inner:
                retried(Failing(s3_error("SlowDown", 503)), "x")
            assert inner.as_dict()["throttled"] == 1
        return count

    with ThreadPoolExecutor(3) as pool:
        none, three, five = pool.map(work, [0, 3, 5])
    assert (none, three.total, five.total) == (None, 6, 10)
    assert retries.PROCESS.as_dict()["timeout"] == before + 1


def test_one_count_is_shared_by_many_threads(waits: list[float]) -> None:
    count = RetryCount()

    def work(_: int) -> None:
        with counting(count):
            retried(Failing(TimeoutError()), "x")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    assert count.as_dict()["timeout"] == count.total == 400


# ---------------------------------------------------------------- what leaves


@pytest.mark.parametrize(("error", "words"), [
    (s3_error("ExpiredToken", 400), ["ExpiredToken", "AWS_ACCESS_KEY_ID", "expired", "run the same command again"]),
    (s3_error("InvalidAccessKeyId", 403), ["InvalidAccessKeyId", "not valid credentials"]),
    (s3_error("AccessDenied", 403), ["AccessDenied", "permissions", "credentials", "FSSPEC_S3_ANON"]),
    (s3_error("RequestTimeTooSkewed", 403), ["clock"]), (s3_error("NoSuchBucket", 404), ["no such bucket", "bucket's name"]),
    (s3_error("400", 400), ["expired credentials"]), (boto.NoCredentialsError(), ["access denied", "credentials"]),
])
def test_systemic_messages_say_whose_credentials_and_what_to_do(monkeypatch, error: Exception, words: list[str]) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    for context in (storage_errors("s3://b/k"), store_errors("s3://b/k"), store_errors("s3://b/k", writing=True)):
        with pytest.raises(SystemicError) as caught, context:
            raise error
        missing = [word for word in words if word not in str(caught.value)]
        assert missing in ([], ["access denied"], ["no such bucket"]), caught.value  # "cannot write the output" stands there
        assert "AKIAEXAMPLE" not in str(caught.value) and caught.value.where == "s3://b/k"
    with pytest.raises(BadRequest), listing_errors("s3://b/k"):
        raise error


def test_the_profile_is_named(monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(SystemicError, match="the AWS profile lab"), storage_errors("s3://b/k"):
        raise s3_error("ExpiredToken", 400)


def test_a_redirect_to_a_presigned_url_does_not_leak_it() -> None:
    error = http_error(403)
    error.message = "no: https://x.s3.amazonaws.com/a?X-Amz-Credential=AKIA%2Fx&X-Amz-Signature=0badc0de&x=1"
    assert "0badc0de" not in describe(error) and "AKIA" not in describe(error) and "x=1" in describe(error)


def test_retried_file_goes_on_where_it_was(waits: list[float]) -> None:
    class Flaky(io.BytesIO):
        calls = 0

        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            self.calls += 1
            if self.calls % 2:
                raise TimeoutError("after the position moved")
            return data

    below = Flaky(b"0123456789")
    with RetriedFile(below, "x") as file:
        assert (file.read(3), file.tell()) == (b"012", 3)
        buffer = bytearray(4)
        assert file.readinto(buffer) == 4 and buffer == b"3456"
        assert file.seek(-2, 2) == 8
        assert file.readall() == b"89" and file.read() == b""
        assert file.seekable() and file.readable() and not file.closed
    assert below.closed and file.closed


# ---------------------------------------------------------------- a store that fails at call k

CLASSES = {
    "transient": [lambda: s3_error("SlowDown", 503), lambda: s3_error("500", 500), lambda: OSError(errno.EIO, "x"), TimeoutError,
                  lambda: ConnectionResetError("x"), lambda: aiohttp.ClientPayloadError("cut"), fsspec.exceptions.FSTimeoutError],
    "systemic": [lambda: s3_error("ExpiredToken", 400), lambda: s3_error("NoSuchBucket", 404), lambda: PermissionError("x"),
                 lambda: OSError(errno.ENOSPC, "x"), boto.NoCredentialsError, lambda: s3_error("400", 400)],
    "bug": [lambda: ZeroDivisionError("x")],
}


class Breaking(MemoryFileSystem):
    """memory:// whose calls number `at` to `at + times - 1` fail, before or (of writes) after they took effect."""

    cachable = False
    at, times, make, after, calls, raised = 0, 0, None, False, 0, 0
    _below = False

    def _wrap(self, name, *args, **kwargs):
        real = getattr(super(), name)
        if self._below:  # one call of ours may use others
            return real(*args, **kwargs)
        self.calls += 1
        fails = self.at <= self.calls < self.at + self.times
        if fails and not self.after:
            self.raised += 1
            raise self.make()
        self._below = True
        try:
            result = real(*args, **kwargs)
        finally:
            self._below = False
        if fails:
            self.raised += 1
            raise self.make()
        return result

    def cat_file(self, *a, **k):
        return self._wrap("cat_file", *a, **k)

    def pipe_file(self, *a, **k):
        return self._wrap("pipe_file", *a, **k)

    def info(self, *a, **k):
        return self._wrap("info", *a, **k)

    def find(self, *a, **k):
        return self._wrap("find", *a, **k)

    def rm_file(self, *a, **k):
        return self._wrap("rm_file", *a, **k)

    def open(self, *a, **k):
        return self._wrap("open", *a, **k)


KEYS = st.sampled_from(["a", "d/b", "d/c"])
STEPS = st.lists(st.tuples(st.sampled_from(["put", "put_if_absent", "get", "open", "exists", "list", "delete"]), KEYS,
                           st.binary(max_size=4)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=300)
@given(steps=STEPS, at=st.integers(1, 14), times=st.integers(1, 8), what=st.sampled_from(sorted(CLASSES)), data=st.data(),
       after=st.booleans())
def test_a_store_that_fails_at_call_k_keeps_the_rule_of_the_class(steps, at, times, what, data, after) -> None:
    make = data.draw(st.sampled_from(CLASSES[what]))
    store = FsspecStore(f"memory://{uuid.uuid4().hex}/out")
    assert store.has_put_if_absent
    fs = store.fs = Breaking(skip_instance_cache=True)
    fs.at, fs.times, fs.make, fs.after = at, times, make, after
    known = (fs._fs_token, store.prefix.strip("/").partition("/")[0])
    with pytest.MonkeyPatch.context() as patch, counting(RetryCount()) as count:
        patch.setattr(retries, "sleep", lambda seconds: None)
        patch.setitem(__import__("dinoray.io.remote_store", fromlist=["x"])._conditional, known, True)
        model: dict[str, bytes] = {}
        for number, (method, key, value) in enumerate(steps):
            # equal bytes after a lost answer count as ours: see put_if_absent
            value = value + bytes([number]) if method == "put_if_absent" else value
            expected, changed = step_of(model, method, key, value)
            raised, retried_before = fs.raised, count.total
            try:
                got = answer(store, method, key, value)
            except (TransientError, SystemicError, ZeroDivisionError) as error:
                assert {"transient": TransientError, "systemic": SystemicError, "bug": ZeroDivisionError}[what] is type(error)
                failed = fs.raised - raised
                assert failed == (TRIES if what == "transient" else 1)
                assert count.total - retried_before == failed - 1
                return  # what a failed write left is either value: the ledger puts the same bytes again
            except FileNotFoundError:
                got = "absent"
            assert got == expected
            model = changed
            assert count.total == fs.raised and (what == "transient" or not fs.raised)
        assert model == {k: FsspecStore(store.url).get(k) for k, _ in FsspecStore(store.url).list()}


def step_of(model: dict[str, bytes], method: str, key: str, value: bytes) -> tuple[object, dict[str, bytes]]:
    """(answer, new state) of a dictionary."""
    if method == "put" or method == "put_if_absent" and key not in model:
        return (True if method == "put_if_absent" else None), {**model, key: value}
    if method == "put_if_absent":
        return False, model
    if method == "delete":
        return None, {k: v for k, v in model.items() if k != key}
    if method in ("get", "open"):
        return model.get(key, "absent"), model
    if method == "exists":
        return key in model, model
    return {k: len(v) for k, v in model.items()}, model


def answer(store: FsspecStore, method: str, key: str, value: bytes) -> object:
    """The same of a store."""
    if method == "list":
        return dict(store.list())
    if method == "open":
        with store.open(key) as file:
            return file.read()
    return getattr(store, method)(key, *([value] if method.startswith("put") else []))
