"""S3 through s3fs, with our retries in place of its own, and public buckets without credentials.

Every single request (a page of a listing, a part of an upload) is tried up to retries.TRIES times and counted;
botocore and s3fs are told to try once. No request hangs: connecting, silence, and the whole of a request are bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import botocore.session
import fsspec.config
from aiobotocore.httpsession import AIOHTTPSession
from fsspec.asyn import sync, sync_wrapper
from fsspec.spec import AbstractBufferedFile
from s3fs import S3FileSystem

from dinoray.errors import SystemicError
from dinoray.io.retries import CONNECT_S, SILENCE_S, longest_s, retried, retried_async
from dinoray.io.storage_errors import classify

logger = logging.getLogger(__name__)

class RetryingS3(S3FileSystem):
    """s3fs whose requests are retried by us. `environment` only tells instances of different credentials apart."""

    retries = 1  # of s3fs itself
    retries_requests = True

    def __init__(self, *args: Any, environment: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.environment = environment

    async def _call_s3(self, method: str, *options: Any, **kwargs: Any) -> Any:
        body = kwargs.get("Body")
        size = len(body) if isinstance(body, (bytes, bytearray, memoryview)) else 0
        once: Callable[[], Any] = super()._call_s3
        return await retried_async(
            lambda: asyncio.wait_for(once(method, *options, **kwargs), longest_s(size)),
            f"s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', kwargs.get('Prefix', ''))}")

    call_s3 = sync_wrapper(_call_s3)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return RangeFile(self, path, mode, **kwargs) if mode == "rb" else super()._open(path, mode, **kwargs)

    def read_object(self, path: str, *, begin: int = 0, end: int | None = None) -> tuple[bytes, str | None]:
        """(bytes begin..end-1, all by default; ETag) from one request. Raises what s3fs raises, also for a body that ends
        early or stalls."""
        bucket, key, _ = self.split_path(path)
        part = {} if end is None else {"Range": f"bytes={begin}-{end - 1}"}

        async def get() -> tuple[bytes, str | None]:
            response = await self._call_s3("get_object", Bucket=bucket, Key=key, **part)
            body = response["Body"]
            try:
                data = await asyncio.wait_for(body.read(), longest_s(response.get("ContentLength") or 0))
            finally:
                body.close()
            return data, response.get("ETag")

        return sync(self.loop, get)

    def head_object(self, path: str) -> dict[str, Any] | None:
        """What a HEAD says of an object, None when there is none. Raises what s3fs raises."""
        bucket, key, _ = self.split_path(path)
        try:
            return self.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
        except OSError as error:
            if classify(error) not in ("denied", "refused"):
                raise
            # an answer to HEAD has no body: ask for one byte to learn the reason (an expired token is a bare 400)
            try:
                self.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
            except FileNotFoundError:
                return None
            raise error


class RangeFile(AbstractBufferedFile):
    """An object opened for reading: ranges are fetched on demand, each retried. (A time-out in s3fs's own S3File ends in an
    IndexError.)"""

    def _fetch_range(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        return retried(lambda: self.fs.read_object(self.path, begin=start, end=end)[0], f"s3://{self.path}")


class _OneTrySession(AIOHTTPSession):
    """aiohttp sends a request again when its connection breaks, and tells nobody. A put-if-absent that took effect would
    then be answered by "is there already": we must know of every try."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False
        return session


# `S3FileSystem.clear_instance_cache()` then forgets our instances as well, as whoever calls it expects
RetryingS3._cache = S3FileSystem._cache

_public: set[str] = set()
"""Buckets that refused our credentials and let us in without."""
_told: set[str] = set()


def connect(url: str, *, write: bool = False) -> tuple[RetryingS3, str]:
    """The file system and path of an s3:// URL: signed when there are credentials, else anonymous (said once).

    FSSPEC_S3_ANON=true makes reading anonymous; with `write` credentials are used where there are any.
    """
    path = RetryingS3._strip_protocol(url)
    bucket = path.partition("/")[0]
    told = _told_anonymous()
    if told and not write or bucket in _public and not write:
        return _instance(True), path
    signed = _has_credentials(_environment())
    if not signed and not told and bucket not in _told:
        _told.add(bucket)
        logger.warning("no S3 credentials were found: s3://%s is read anonymously", bucket)
    return _instance(not signed), path


def check_may_write(fs: Any, url: str) -> None:
    """Raises SystemicError where writing would go out without credentials that nobody renounced."""
    if isinstance(fs, RetryingS3) and fs.anon and not _told_anonymous():
        raise SystemicError("writing to S3 needs credentials, and none were found", where=url,
                            todo="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, then run the same command "
                            "again (a store that anybody may write to: FSSPEC_S3_ANON=true)")


def anonymous_twin(fs: Any) -> RetryingS3 | None:
    """The same store without credentials; None for what is anonymous already, or no S3."""
    return _instance(True) if isinstance(fs, RetryingS3) and not fs.anon else None


def remember_public(path: str) -> None:
    """From now on this process reads the bucket of `path` anonymously."""
    bucket = path.partition("/")[0]
    if bucket not in _public:
        _public.add(bucket)
        logger.warning("s3://%s refuses the credentials and is public: it is read anonymously", bucket)


def _instance(anonymous: bool) -> RetryingS3:
    config = {"connect_timeout": CONNECT_S, "read_timeout": SILENCE_S, "retries": {"total_max_attempts": 1},
              "max_pool_connections": 64, "http_session_cls": _OneTrySession, **_settings().get("config_kwargs", {})}
    return RetryingS3(anon=anonymous, use_listings_cache=False, config_kwargs=config, environment=_environment())


def _settings() -> dict[str, Any]:
    """What the user configured for s3 in fsspec (FSSPEC_S3..., ~/.config/fsspec)."""
    return {**fsspec.config.conf.get("s3", {}), **fsspec.config.conf.get("s3a", {})}


def _told_anonymous() -> bool:
    """Whether FSSPEC_S3_ANON asks for it; as text, `false` counts as no."""
    return str(_settings().get("anon", "")).lower() in ("1", "true", "yes", "on")


def _environment() -> str:
    """A digest of the AWS variables: instances and look-ups belong to one state of them."""
    text = "\0".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("AWS_"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=8)
def _has_credentials(environment: str) -> bool:
    """Whether botocore finds credentials anywhere: environment, files, SSO, the role of the machine or container."""
    del environment  # the key of the cache
    settings = _settings()
    if settings.get("key") or settings.get("username"):
        return True
    return botocore.session.Session(profile=settings.get("profile")).get_credentials() is not None
