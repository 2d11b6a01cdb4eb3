"""What storage raises -> the three classes of errors.py; the one place that knows the network libraries.

`classify` names the trouble; `TRANSIENT` are the names that are worth another try (retries.py), all others say the
same however often one asks. The context managers turn what is left into our own errors, with a message that says
which credentials were used and what to do, and with no secret of a URL in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from dinoray.config import without_secrets
from dinoray.errors import BadRequest, DinorayError, ItemError, SystemicError, TransientError

TRANSIENT = ("throttled", "server_error", "timeout", "connection", "truncated")
"""Kinds of trouble that may pass; the keys of the counts in receipts."""

_NETWORK = {"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "urllib3", "ssl", "google",
            "azure", "adlfs", "asyncio", "concurrent"}
_CODES = {  # https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, and what compatible stores send
    "throttled": {"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled",
                  "TooManyRequests", "TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded", "503", "429"},
    "timeout": {"RequestTimeout", "408"},
    "truncated": {"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"},
    "server_error": {"InternalError", "InternalFailure", "OperationAborted", "ConditionalRequestConflict", "409"},
    "exists": {"PreconditionFailed", "412"},
    "unsupported": {"NotImplemented", "501"},
    "bucket": {"NoSuchBucket", "InvalidBucketName"},
    "range": {"InvalidRange", "416"},
    "missing": {"NoSuchKey", "NoSuchVersion", "404", "410"},
    "denied": {"AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationHeaderMalformed", "CredentialsNotSupported",
               "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidPayer",
               "InvalidSecurity", "InvalidToken", "NotSignedUp", "RequestExpired", "RequestTimeTooSkewed",
               "SignatureDoesNotMatch", "TokenRefreshRequired", "Unauthorized", "401", "403"},
}
_KIND_OF_CODE = {code: kind for kind, codes in _CODES.items() for code in codes}
_CLASSES = {  # by the names of the class and its bases: none of these libraries needs to be installed
    "denied": {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "ConfigParseError",
               "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError", "RefreshError", "PermissionError"},
    "exists": {"FileExistsError"},
    "timeout": {"TimeoutError", "ReadTimeoutError", "ConnectTimeoutError", "ServerTimeoutError"},
    "truncated": {"TruncatedBody", "IncompleteReadError", "IncompleteRead", "ClientPayloadError", "ResponseStreamingError",
                  "ResponseParserError", "FlexibleChecksumError", "ContentLengthError"},
    "connection": {"ConnectionError", "EndpointConnectionError", "ConnectionClosedError", "ClientConnectionError", "gaierror",
                   "HTTPClientError", "ProtocolError"},
}
_NO_SUCH_NAME = {errno.ENAMETOOLONG, errno.ELOOP}
"""No file can have this name."""
_ERRNO = {
    "denied": {errno.EACCES, errno.EPERM},
    "full": {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG},
    "unsupported": {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK},
    "refused": {errno.EMFILE, errno.ENFILE},
    "throttled": {errno.EAGAIN, errno.EBUSY},
    "timeout": {errno.ETIMEDOUT},
    "connection": {errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN, errno.ENETUNREACH,
                   errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN},
}
MOST_TEXT = 2000
"""Characters of another library's message that are passed on."""
_AGAIN = "then run the same command again: it resumes"


class TruncatedBody(OSError):
    """Fewer bytes arrived than the store said there are."""


def classify(error: BaseException) -> str | None:
    """One of TRANSIENT, or missing, folder, exists, denied, bucket (none of this name), unsupported (by the store),
    full (no space, read-only), range (none of the bytes asked for exist), refused (another answer of 4xx); None for an error
    that storage does not raise: a bug of ours,
    or one that has its class already.
    """
    if isinstance(error, DinorayError):
        return None
    chain = _chain(error)
    for each in chain:  # what the server said counts more than what a library made of it
        code = _code(each)
        if code:
            return _KIND_OF_CODE.get(code) or _by_status(_status(each))
    if any("CERTIFICATE_VERIFY_FAILED" in str(each) for each in chain):
        return "refused"
    for each in reversed(chain):  # the deepest cause: fsspec says "not found" of a refused connection
        if isinstance(each, IsADirectoryError):
            return "folder"
        if isinstance(each, (FileNotFoundError, NotADirectoryError)) and each is error:
            return "missing"
        names = {base.__name__ for base in type(each).__mro__}
        for kind, classes in _CLASSES.items():
            if names & classes:
                return kind
        if "ParamValidationError" in names and "bucket" in str(each).lower():
            return "bucket"
    number = getattr(error, "errno", None)
    if number in _NO_SUCH_NAME and not isinstance(error, FileNotFoundError):
        return "missing"
    for kind, numbers in _ERRNO.items():
        if number in numbers:
            return kind
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, OSError):
        return "server_error"  # EIO, ESTALE and whatever else a disk or a file server says
    return "connection" if type(error).__module__.partition(".")[0] in _NETWORK else None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it (s3fs and fsspec keep the library's own error as the cause)."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__  # type: ignore[assignment]
    return chain


def _status(error: BaseException) -> int | None:
    """The HTTP status of a library's error."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if type(error).__module__ == "aiohttp.http_exceptions":
        return None  # of the parser: its `code` 400 is no answer of the server's
    for name in ("status", "status_code", "code"):  # aiohttp, azure, google
        value = getattr(error, name, None)
        if isinstance(value, int) and 300 <= value < 600:
            return value
    return None


def _code(error: BaseException) -> str:
    """The store's word for the trouble (`SlowDown`), else the HTTP status as text, else empty."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code") or "")
        if code in _KIND_OF_CODE or code and not _status(error):
            return code
    status = _status(error)
    return str(status) if status else ""


def _by_status(status: int | None) -> str:
    """Of an answer whose code we do not know."""
    return "server_error" if status is None or status >= 500 else "refused"


def retry_after(error: BaseException) -> float:
    """Seconds that the server asked us to wait; 0 when it did not say."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders") if isinstance(response, dict) else \
            getattr(each, "headers", None)
        value = {str(k).lower(): v for k, v in (headers or {}).items()}.get("retry-after", "")
        if re.fullmatch(r"\d{1,6}", str(value)):
            return float(value)
    return 0.0


def describe(error: BaseException) -> str:
    """What happened in a line, with the store's code and without secrets."""
    code = next((c for c in map(_code, _chain(error)) if c), "")
    text = without_secrets((str(error) or type(error).__name__)[:MOST_TEXT])
    return text if not code or code in text else f"{code}: {text}"


def whose_credentials(url: str) -> str:
    """Which credentials speak for us at `url`, in words; never the credentials."""
    protocol = url.partition("://")[0] if "://" in url else ""
    if protocol in ("s3", "s3a"):
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            return "the credentials in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
        return f"the AWS profile {profile}" if profile else "the default AWS profile or this machine's role"
    if protocol in ("", "file", "local"):
        return f"the permissions of user {os.geteuid()}" if hasattr(os, "geteuid") else "the permissions"
    return f"the credentials for {protocol}"


def _todo(error: BaseException, kind: str | None, url: str) -> str:
    """What to do about trouble that does not pass by itself."""
    codes = {_code(each) for each in _chain(error)}
    whose = whose_credentials(url)
    remote = "://" in url and not url.startswith(("file:", "local:")) or any(codes)
    if kind == "denied" and remote:
        if codes & {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}:
            return f"{whose} have expired: get new credentials (for instance aws sso login), {_AGAIN}"
        if codes & {"InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch", "InvalidToken"}:
            return f"{whose} are not valid credentials of this store: mend them, {_AGAIN}"
        if "RequestTimeTooSkewed" in codes:
            return f"set the clock of this machine (the credentials are signed with the time), {_AGAIN}"
        return (f"check the permissions and credentials (used: {whose}; for a public bucket: FSSPEC_S3_ANON=true), {_AGAIN}")
    if kind == "denied":
        return f"mend the permissions of the file and of the folders above it (used: {whose}), {_AGAIN}"
    if kind == "bucket":
        return f"check the bucket's name and the endpoint (AWS_ENDPOINT_URL), {_AGAIN}"
    if kind == "full":
        return f"free space or mend the permissions, {_AGAIN}"
    if "400" in codes:  # a HEAD has no body that could name the reason
        return f"often expired credentials (used: {whose}): renew them, {_AGAIN}"
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return f"raise the limit of open files (ulimit -n), {_AGAIN}"
    return f"mend the cause named above, {_AGAIN}"


def transient_error(error: BaseException, url: str, tries: int) -> TransientError:
    """What is raised when the last try failed."""
    return TransientError(f"storage failed {tries} times, the last time with: {type(error).__name__}: {describe(error)}",
                          where=without_secrets(url), todo="run the same command again when the storage answers: it resumes")


def _systemic(error: BaseException, kind: str | None, url: str, doing: str) -> SystemicError:
    what = {"denied": "access denied", "bucket": "there is no such bucket"}.get(str(kind), doing)
    return SystemicError(f"{what}: {describe(error)}", where=without_secrets(url), todo=_todo(error, kind, url))


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """While reading one input: ItemError `missing` or `not_image` (a folder), SystemicError when access is
    denied (401, 403, EACCES, no credentials) or refused, TransientError for other trouble of storage or network."""
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
        if kind in TRANSIENT:
            raise transient_error(error, uri, 1) from error
        raise _systemic(error, kind, uri, "reading failed") from error


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
        if kind in TRANSIENT:
            raise transient_error(error, uri, 1) from error
        systemic = _systemic(error, kind, uri, "listing failed")
        raise BadRequest(systemic.what, where=uri, todo=systemic.todo) from error


@contextlib.contextmanager
def store_errors(url: str, *, writing: bool = False) -> Iterator[None]:
    """In a method of a store: FileNotFoundError for what is absent (NotADirectoryError below a file), TransientError,
    and SystemicError for all that will not pass. No other OSError leaves."""
    doing = "cannot write the output" if writing else "cannot read the output"
    try:
        yield
    except DinorayError:
        raise
    except Exception as error:
        kind = classify(error)
        if kind is None:
            raise
        if kind in TRANSIENT:
            raise transient_error(error, url, 1) from error
        if kind in ("missing", "folder") and not writing:
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from error
        if writing:  # the sentence that stands first in the message, whatever the kind
            raise SystemicError(f"{doing}: {describe(error)}", where=without_secrets(url),
                                todo=_todo(error, "full" if kind in ("missing", "folder") else kind, url)) from error
        raise _systemic(error, kind, url, doing) from error
