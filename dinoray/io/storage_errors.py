"""What storage raises -> the three classes of errors.py; the one place that knows the network libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dinoray.errors import BadRequest, DinorayError, ItemError, SystemicError, TransientError

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
                   "UnauthorizedSSOTokenError", "TokenRetrievalError", "RefreshError"}
_NETWORK = {"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "urllib3", "ssl", "google",
            "azure", "adlfs", "asyncio", "concurrent"}
_CREDENTIALS_TODO = ("check the permissions and credentials (for a public bucket: FSSPEC_S3_ANON=true), "
                     "then run the same command again")


def classify(error: BaseException) -> str | None:
    """missing, folder, denied, transient; None for an error that storage does not raise (a bug of ours)."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "missing"
    if isinstance(error, IsADirectoryError):
        return "folder"
    for each in (error, error.__cause__):  # s3fs keeps botocore's error as the cause
        response = getattr(each, "response", None)
        status = getattr(each, "status", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        denied = isinstance(each, PermissionError) or status in (401, 403)
        if denied or type(each).__name__ in _NO_CREDENTIALS:
            return "denied"
    if isinstance(error, (OSError, TimeoutError)) or type(error).__module__.partition(".")[0] in _NETWORK:
        return "transient"
    return None


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """While reading one input: ItemError `missing` or `not_image` (a folder), SystemicError when access is
    denied (401, 403, EACCES, no credentials), TransientError for other trouble of storage or network."""
    try:
        yield
    except DinorayError:
        raise
    except Exception as error:
        kind = classify(error)
        if kind is None:
            raise
        if kind == "missing":
            raise ItemError("missing", "no such file", where=uri) from error
        if kind == "folder":
            raise ItemError("not_image", "a folder, not a file", where=uri) from error
        if kind == "denied":
            raise SystemicError(f"access denied: {error}", where=uri, todo=_CREDENTIALS_TODO) from error
        raise TransientError(f"reading failed: {type(error).__name__}: {error}", where=uri) from error


@contextlib.contextmanager
def listing_errors(uri: str) -> Iterator[None]:
    """While listing: BadRequest for what is missing or denied, TransientError for other trouble."""
    try:
        yield
    except DinorayError:
        raise
    except Exception as error:
        kind = classify(error)
        if kind is None:
            raise
        if kind in ("missing", "folder"):
            raise BadRequest("no such file or folder", where=uri, todo="check the path") from error
        if kind == "denied":
            raise BadRequest(f"access denied: {error}", where=uri, todo=_CREDENTIALS_TODO) from error
        raise TransientError(f"listing failed: {type(error).__name__}: {error}", where=uri) from error
