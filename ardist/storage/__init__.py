"""Bytes by name: local folders and ``s3://`` prefixes behind one small interface."""

from __future__ import annotations

from ardist.storage.base import (
    ChangedObjectError,
    MissingObjectError,
    ObjectInfo,
    Storage,
    StorageError,
)
from ardist.storage.local import LocalStorage
from ardist.storage.opening import is_remote, open_storage

__all__ = [
    "ChangedObjectError",
    "LocalStorage",
    "MissingObjectError",
    "ObjectInfo",
    "Storage",
    "StorageError",
    "is_remote",
    "open_storage",
]
