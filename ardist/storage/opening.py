"""From a path or URL to the storage that serves it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ardist.errors import InvalidValueError
from ardist.storage.base import Storage
from ardist.storage.local import LocalStorage

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")


def is_remote(url: str | os.PathLike[str]) -> bool:
    """Whether `url` names an object store rather than a folder of this machine."""
    match = _SCHEME.match(os.fspath(url))
    return match is not None and match[1].lower() != "file"


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage rooted at a folder, ``file://`` URL or ``s3://bucket/prefix``. Contacts nothing."""
    text = os.fspath(url)
    match = _SCHEME.match(text)
    if match is None:
        if not text:
            raise InvalidValueError("an empty path is not a storage; legal: a folder or s3://bucket/prefix")
        return LocalStorage(Path(text).expanduser())
    scheme = match[1].lower()
    rest = text[match.end() :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise InvalidValueError(f"{text!r}: a file URL names an absolute path, such as file:///data/clips")
        return LocalStorage(Path(rest))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if "?" in bucket or "@" in bucket or not bucket:
            raise InvalidValueError("an S3 address is s3://bucket/prefix, without credentials or a query string")
        from ardist.storage.s3 import S3Storage

        return S3Storage(bucket, prefix)
    raise InvalidValueError(
        f"storage scheme {scheme!r} is not known; legal: a folder, file:///path or s3://bucket/prefix"
    )
