"""Passwords and signatures in URLs: found, so that they are refused, and taken out of messages."""

from __future__ import annotations

import re

_SECRET_NAME = (r"[\w.-]{0,64}(?:sig(?:nature)?|token|secret|passw\w*|pwd|credential|auth(?:orization)?|api[-_]?key|"
                r"access[-_]?key(?:id)?|key-pair-id|jwt)")
_SECRET_QUERY = re.compile(rf"([?&;](?:{_SECRET_NAME})=)([^&;#\s'\"<>]+)", re.IGNORECASE)
_PASSWORD = re.compile(r"([\w+.-]{1,32}://[^/\s@]{0,1000}:)([^/\s]{0,1000})@")


def secret_in_url(url: str) -> str | None:
    """What kind of secret a URL holds ("a password", "a secret (X-Amz-Signature)"), None when it holds none.

    A presigned URL is a password: whoever reads it in a record or a row can use it.
    """
    if "://" not in url:
        return None  # `?` in a local path is a glob
    if _PASSWORD.match(url):
        return "a password"
    found = _SECRET_QUERY.search(url)
    return f"a secret ({found[1][1:-1]})" if found else None


def without_secrets(text: str) -> str:
    """A message with the passwords and signatures of the URLs in it replaced by `...`."""
    return _SECRET_QUERY.sub(r"\1...", _PASSWORD.sub(r"\1...@", text))
