"""Objects of any file system that fsspec knows: `s3://` (s3.py), `gs://`, `memory://`, `http(s)://` to read.

Puts are atomic by the nature of object stores. Put-if-absent is `If-None-Match: *` (or the store's like); whether the
store honours that is found out with three small objects, once per process and bucket, never guessed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.core import url_to_fs

from dinoray.errors import BadRequest, DinorayError, SystemicError
from dinoray.io.retries import CONNECT_S, SILENCE_S, RetriedFile, retried
from dinoray.io.storage_errors import classify, store_errors
from dinoray.io.store_base import TMP_FOLDER, Store, safe_join

logger = logging.getLogger(__name__)
T = TypeVar("T")

_conditional: dict[tuple[str, str], bool] = {}
_conditional_lock = threading.Lock()
_check_then_put = threading.Lock()


def filesystem(url: str, *, write: bool = False) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of a URL and the path in it; a missing driver is said in plain words.

    Instances are cached by fsspec. Credentials come from the environment, as for every S3 client; without any, S3 is
    read anonymously. `write`: for an output of ours. Raises BadRequest for an unknown protocol or a driver that is not
    installed.
    """
    protocol = url.split("://", 1)[0] if "://" in url else "file"
    try:
        if protocol in ("s3", "s3a"):
            from dinoray.io import s3

            with store_errors(url):
                return s3.connect(url, write=write)
        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)}
        return url_to_fs(url, **options)
    except ImportError as error:
        raise BadRequest(f"reading {protocol}:// needs another package: {error}", where=url,
                         todo="pip install s3fs for S3, or the package named above") from error
    except ValueError as error:
        raise BadRequest(f"unknown kind of URL: {error}", where=url,
                         todo="use a local path, s3://, gs://, or another protocol of fsspec") from error


def on_inputs(url: str, call: Callable[[Any], T]) -> T:
    """`call(file system of url)`, retried; where our credentials are refused and the bucket is public, without them.

    Raises what the last try raised (TransientError where it was transient).
    """
    fs, path = filesystem(url)
    try:
        return _retried(fs, lambda: call(fs), url)
    except Exception as error:
        if classify(error) != "denied" or not _is_s3(fs):
            raise
        answer = _without_credentials(fs, path, url, call)
        if not answer:
            raise  # what the user's own credentials met says more than what a stranger met
        return answer[0]


def _without_credentials(fs: Any, path: str, url: str, call: Callable[[Any], T]) -> list[T]:
    """The answer of a public bucket; nothing where there is none."""
    from dinoray.io import s3

    public = s3.anonymous_twin(fs)
    if public is None:
        return []
    try:
        answer = _retried(public, lambda: call(public), url)
    except (OSError, DinorayError):
        return []
    s3.remember_public(path)
    return [answer]


def read_object(fs: Any, path: str) -> tuple[bytes, str | None]:
    """(all bytes, ETag) of an object in one request; no ETag where the store does not say it with the bytes.

    Raises what the file system raises; fewer bytes than the server announced are an error.
    """
    if _is_s3(fs):
        data, version = fs.read_object(path)
    elif "http" in fs.protocol:
        data, version = sync(fs.loop, _http_get, fs, path)
    else:
        return fs.cat_file(path), None
    return data, version.strip('"') if version else None


async def _http_get(fs: Any, url: str) -> tuple[bytes, str | None]:
    session = await fs.set_session()
    # identity: the size and ETag of what is stored, as the listing asked for them
    async with session.get(fs.encode_url(url), headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        return await response.read(), response.headers.get("ETag")


def _is_s3(fs: Any) -> bool:
    """Whether it is s3.RetryingS3, without importing s3fs where nobody uses it."""
    return getattr(fs, "retries_requests", False)


def _retried(fs: Any, call: Callable[[], T], where: str, *, whole: bool = False) -> T:
    """Retry a call, unless the file system retries its single requests itself; `whole`: those with a body to read too."""
    return call() if _is_s3(fs) and not whole else retried(call, where)


class FsspecStore(Store):
    """Any URL that is not local: `s3://bucket/prefix` (extra `s3`), `memory://x`, `gs://...`."""

    def __init__(self, url: str):
        self.fs, self.prefix = filesystem(url, write=True)
        self.prefix = self.prefix.rstrip("/")
        self.url = url.rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self.prefix}/{safe_join(key)}"

    def _do(self, key: str, call: Callable[[], T], *, writing: bool = False, whole: bool = False) -> T:
        where = f"{self.url}/{key}"
        with store_errors(where, writing=writing):
            if writing and _is_s3(self.fs):
                from dinoray.io import s3

                s3.check_may_write(self.fs, where)
            return _retried(self.fs, call, where, whole=whole)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        return self._do(key, lambda: read_object(self.fs, path)[0], whole=True)

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        file = self._do(key, lambda: self.fs.open(path, "rb"))
        return file if isinstance(file, RetriedFile) else RetriedFile(file, f"{self.url}/{key}")  # type: ignore[return-value]

    def get_range(self, key: str, begin: int, end: int | None = None) -> bytes:
        path = self._path(key)

        def once() -> bytes:  # one request, without the read-ahead of an open file
            try:
                return self.fs.cat_file(path, start=begin, end=end)
            except OSError as error:
                if classify(error) != "range":
                    raise
                return b""  # the object ends before

        return self._do(key, once, whole=True)

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        self._do(key, lambda: self.fs.pipe_file(path, bytes(data)), writing=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if not self.has_put_if_absent:
            return self._put_after_check(key, data)
        tries = 0

        def once() -> bool:
            nonlocal tries
            tries += 1
            try:
                self.fs.pipe_file(path, bytes(data), mode="create")
            except Exception as error:
                if classify(error) != "exists":
                    raise
                # an earlier try may have created it although its answer was lost
                return tries > 1 and read_object(self.fs, path)[0] == bytes(data)
            return True

        return self._do(key, once, writing=True, whole=True)

    @property
    def has_put_if_absent(self) -> bool:
        """Whether the store creates an object only where there is none; tried out at the first call of this process."""
        known_as = (getattr(self.fs, "_fs_token", type(self.fs).__name__), self.prefix.strip("/").partition("/")[0])
        with _conditional_lock:
            if known_as not in _conditional:
                _conditional[known_as] = self._try_put_if_absent()
                if not _conditional[known_as]:
                    logger.warning("%s has no conditional put: two runs at once on this output would not be locked out of each "
                                   "other (docs/storage.md)", self.url)
            return _conditional[known_as]

    def _try_put_if_absent(self) -> bool:
        key = f"{TMP_FOLDER}/conditional-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        path = self._path(key)

        def create() -> str:
            try:
                self.fs.pipe_file(path, b"is put-if-absent honoured?", mode="create")
            except (NotImplementedError, TypeError):  # a file system that does not know the argument
                return "unsupported"
            except Exception as error:
                kind = classify(error)
                if kind in ("exists", "unsupported"):
                    return kind
                raise
            return "created"

        answers = []
        try:
            while len(answers) < 2 and answers[-1:] != ["unsupported"]:
                answers.append(self._do(key, create, writing=True, whole=True))
        finally:
            if "created" in answers:
                with contextlib.suppress(SystemicError):  # rights to put, not to delete: a few bytes stay
                    self.delete(key)
        return answers[-1] == "exists"

    def _put_after_check(self, key: str, data: bytes) -> bool:
        with _check_then_put:  # exact among the threads of this process
            if self.exists(key):
                return False
            self.put(key, data)
            return True

    def exists(self, key: str) -> bool:
        path = self._path(key)

        def once() -> bool:
            if _is_s3(self.fs):
                return self.fs.head_object(path) is not None
            # not fs.exists or isfile: they answer no to every error; nor its listing cache: another process may have put
            self.fs.invalidate_cache(path)
            try:
                return self.fs.info(path)["type"] == "file"
            except FileNotFoundError as error:
                if classify(error) != "missing":
                    raise
                return False

        return self._do(key, once)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        top = f"{self.prefix}/{safe_join(prefix)}" if prefix else self.prefix
        self.fs.invalidate_cache()
        cut = len(self.fs._strip_protocol(self.prefix)) + 1
        found = self._do(prefix, lambda: self._find(top))
        for path, info in found.items():
            if info["type"] == "file":
                yield path[cut:], info["size"]

    def _find(self, top: str) -> dict[str, Any]:
        try:
            return self.fs.find(top, detail=True)
        except FileNotFoundError as error:
            if classify(error) != "missing":  # no such bucket
                raise
            return {}

    def delete(self, key: str) -> None:
        path = self._path(key)

        def once() -> None:
            try:
                self.fs.rm_file(path)
            except FileNotFoundError as error:
                if classify(error) != "missing":
                    raise

        self._do(key, once, writing=True)
