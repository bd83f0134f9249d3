"""An ``s3://bucket/prefix`` as storage: ranges, conditional creation, multipart uploads, bounded retries."""

from __future__ import annotations

import hashlib
import os
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from ardist import fault
from ardist.errors import InvalidValueError
from ardist.events import events
from ardist.storage.base import (
    CONDITION_PROBE,
    ChangedObjectError,
    MissingObjectError,
    ObjectInfo,
    Storage,
    StorageError,
    check_range,
)
from ardist.storage.retry import ExhaustedError, RetryPolicy, TransientError
from ardist.storage.s3_client import PreconditionError, RangeError, attempt

T = TypeVar("T")

MULTIPART_FROM = 64 * 2**20
PART_BYTES = 16 * 2**20
_PARTS_AT_ONCE = 4
_MAX_KEY = 1024
_UPLOADS_PER_PAGE = 1000
_BODY_CHUNK = 256 * 2**10
"""Small enough to stay in the processor's cache until it is stored."""

_SLOW_AFTER_SECONDS, _SLOW_BYTES_PER_SECOND = 30.0, 10 * 1024


class S3Storage(Storage):
    """Objects of a bucket below a prefix. Endpoint and credentials come from the standard AWS settings."""

    def __init__(self, bucket: str, prefix: str = "", *, policy: RetryPolicy | None = None) -> None:
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._policy = policy or RetryPolicy()

    def local_path(self, name: str) -> Path | None:
        return None

    def stat(self, name: str) -> ObjectInfo:
        head = self._call(
            "stat",
            name,
            lambda client, where: _whole(client.head_object(**where), "ETag", "ContentLength", "LastModified"),
        )
        return ObjectInfo(name, int(head["ContentLength"]), head["LastModified"].timestamp(), head["ETag"])

    def walk(self, prefix: str = "") -> Iterator[ObjectInfo]:
        base = f"{self._prefix}/" if self._prefix else ""
        page: dict[str, Any] = {}
        while True:
            more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else {}
            arguments = {"Bucket": self._bucket, "Prefix": base + prefix, **more}
            page = self._page(prefix, arguments)
            for found in page.get("Contents", ()):
                name = found["Key"].removeprefix(base)
                if name and not name.endswith("/"):
                    yield ObjectInfo(name, int(found["Size"]), found["LastModified"].timestamp(), found["ETag"])
            if not page.get("IsTruncated"):
                return

    def _page(self, prefix: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._run("list", prefix, lambda client: _whole(client.list_objects_v2(**arguments), "Name"))

    def read(self, name: str, start: int | None = None, length: int | None = None, version: str | None = None) -> bytes:
        received = bytearray()
        self.stream(name, received.extend, start, length, version)
        return bytes(received)

    def stream(
        self,
        name: str,
        take: Callable[[bytes], object],
        start: int | None = None,
        length: int | None = None,
        version: str | None = None,
    ) -> int:
        first, wanted = check_range(start, length)
        if wanted == 0:
            return 0
        download = _Download(self, name, take, first, wanted, version)
        try:
            return self._run("read", name, download.attempt)
        except PreconditionError:
            raise ChangedObjectError(f"{self.url}/{name} was replaced since it was listed") from None
        except RangeError:
            if download.received:
                raise ChangedObjectError(f"{self.url}/{name} shrank while it was read") from None
            return 0

    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> None:
        fault.point("storage.s3_before_put")
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        if size >= MULTIPART_FROM:
            self._put_parts(name, data, size)
        else:
            body = data if isinstance(data, bytes) else data.read_bytes()
            digest = b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            self._call(
                "put",
                name,
                lambda client, where: _whole(client.put_object(Body=body, ContentMD5=digest, **where), "ETag"),
            )
        fault.point("storage.s3_after_put")
        if move and isinstance(data, Path):
            data.unlink()

    def create(self, name: str, data: bytes) -> bool:
        fault.point("storage.s3_before_create")
        tried = [0]

        def request(client: Any, where: dict[str, str]) -> Any:
            tried[0] += 1
            return _whole(client.put_object(Body=data, IfNoneMatch="*", **where), "ETag")

        try:
            self._call("create", name, request)
        except PreconditionError:
            # After an answer that got lost, the object in our way may be our own.
            return tried[0] > 1 and self.read(name) == data
        fault.point("storage.s3_after_create")
        return True

    def delete(self, name: str) -> None:
        try:
            self._call("delete", name, lambda client, where: client.delete_object(**where))
        except MissingObjectError:
            return

    def check_conditional_create(self) -> None:
        name = f"{CONDITION_PROBE}{os.getpid()}-{time.time_ns()}"
        try:
            if not self.create(name, b"1") or self.create(name, b"2") or self.read(name) != b"1":
                raise StorageError(
                    f"{self.url}: this server does not honour conditional writes (If-None-Match: *); "
                    "two builders could overwrite each other, so nothing was built"
                )
        finally:
            self.delete(name)

    def server_time(self) -> float | None:
        """The time of day by the server's clock, to a second, as its answer to a listing tells; None: it tells none."""
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix, "MaxKeys": 1}
        answer = self._run("list", "", lambda client: _whole(client.list_objects_v2(**arguments), "Name"))
        told = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
        return None if told is None else parsedate_to_datetime(told).timestamp()

    def abort_uploads(self, older_than: float) -> int:
        """Abort multipart uploads below the prefix that began more than `older_than` seconds ago; how many."""
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": f"{self._prefix}/" if self._prefix else ""}
        stale: list[dict[str, Any]] = []
        page: dict[str, Any] = {"IsTruncated": True}
        while page["IsTruncated"]:
            page = self._uploads_page({**arguments, "MaxUploads": _UPLOADS_PER_PAGE})
            stale += [u for u in page.get("Uploads", ()) if time.time() - u["Initiated"].timestamp() >= older_than]
            arguments["KeyMarker"] = page.get("NextKeyMarker", "")
            arguments["UploadIdMarker"] = page.get("NextUploadIdMarker", "")
        for upload in stale:
            self._abort(upload["Key"], upload["UploadId"])
        return len(stale)

    def _uploads_page(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._run(
            "list uploads", "", lambda client: _whole(client.list_multipart_uploads(**arguments), "IsTruncated")
        )

    def _put_parts(self, name: str, data: bytes | Path, size: int) -> None:
        part_bytes = max(PART_BYTES, -(-size // 10_000))
        begun = self._call(
            "begin upload", name, lambda client, where: _whole(client.create_multipart_upload(**where), "UploadId")
        )
        upload = begun["UploadId"]

        def put_part(number: int) -> dict[str, Any]:
            low = (number - 1) * part_bytes
            body = _slice(data, low, min(part_bytes, size - low))
            fault.point("storage.s3_before_part")
            answer = self._call(
                f"put part {number}",
                name,
                lambda client, where: _whole(
                    client.upload_part(Body=body, PartNumber=number, UploadId=upload, **where), "ETag"
                ),
            )
            return {"ETag": answer["ETag"], "PartNumber": number}

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="s3-part") as pool:
                parts = list(pool.map(put_part, range(1, -(-size // part_bytes) + 1)))
            self._complete(name, upload, parts, size)
        except BaseException:
            self._abort(self._key(name), upload)
            raise

    def _complete(self, name: str, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        try:
            self._call(
                "finish upload",
                name,
                lambda client, where: _whole(
                    client.complete_multipart_upload(UploadId=upload, MultipartUpload={"Parts": parts}, **where), "ETag"
                ),
            )
        except MissingObjectError:
            # The answer to a first try was lost and the upload is finished already: then the object is there.
            if self.size(name) != size:
                raise

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._run(
                "abort upload",
                key,
                lambda client: client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload),
            )
        except (StorageError, MissingObjectError) as error:
            events.count("storage.upload_left_behind", key=key, reason=error)

    def _key(self, name: str) -> str:
        key = f"{self._prefix}/{name}" if self._prefix else name
        if not name or len(key.encode("utf-8", "surrogatepass")) > _MAX_KEY:
            raise InvalidValueError(f"{key!r} is not a key of an object: 1 to {_MAX_KEY} bytes, the prefix included")
        return key

    def _call(self, operation: str, name: str, request: Callable[[Any, dict[str, str]], T]) -> T:
        where = {"Bucket": self._bucket, "Key": self._key(name)}
        return self._run(operation, name, lambda client: request(client, where))

    def _run(self, operation: str, name: str, request: Callable[[Any], T]) -> T:
        refreshed: list[bool] = []
        address = f"{self.url}/{name}".rstrip("/")
        try:
            return self._policy.run(operation, address, lambda: attempt(address, refreshed, request))
        except ExhaustedError as error:
            raise StorageError(f"cannot {operation} {address}: {error}") from error


class _Download:
    """One read over all its attempts: a broken body is resumed where it broke."""

    def __init__(
        self,
        storage: S3Storage,
        name: str,
        take: Callable[[bytes], object],
        start: int,
        length: int | None,
        version: str | None,
    ) -> None:
        self._take = take
        self._where = {"Bucket": storage._bucket, "Key": storage._key(name)}
        self._start, self._length, self._version = start, length, version
        self.received = 0

    def attempt(self, client: Any) -> int:
        """Receive what is still missing; returns the bytes received in all."""
        at = self._start + self.received
        ranged = at > 0 or self._length is not None
        arguments = dict(self._where)
        if ranged:
            last = "" if self._length is None else str(self._start + self._length - 1)
            arguments["Range"] = f"bytes={at}-{last}"
        if self._version is not None:
            arguments["IfMatch"] = self._version
        answer = _whole(client.get_object(**arguments), "ETag", "ContentLength")
        # From here on all pieces must be of this version.
        self._version = self._version or answer["ETag"]
        body = answer["Body"]
        try:
            skip, expected = _extent(answer, at, self._length and self._start + self._length - at, ranged)
            self._receive(body, skip, expected)
        finally:
            body.close()
        return self.received

    def _receive(self, body: Any, skip: int, expected: int) -> None:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        begun, got = time.monotonic(), 0
        while got < skip + expected:
            try:
                chunk = body.read(min(_BODY_CHUNK, skip + expected - got))
            except (BotoCoreError, HTTPError, OSError) as error:
                raise TransientError(f"the body broke after {got} bytes: {type(error).__name__}") from error
            if not chunk:
                raise TransientError(f"the body ended after {got} of {skip + expected} bytes")
            wanted = chunk[skip - got :] if got < skip else chunk
            self._take(wanted)
            self.received += len(wanted)
            got += len(chunk)
            seconds = time.monotonic() - begun
            if seconds > _SLOW_AFTER_SECONDS and got < _SLOW_BYTES_PER_SECOND * seconds:
                raise TransientError(f"only {got} bytes in {seconds:.0f} s")


def _whole(answer: dict[str, Any], *fields: str) -> dict[str, Any]:
    """An answer that has what a store's answer has; a proxy's web page with status 200 has not."""
    missing = [field for field in fields if field not in answer]
    if missing:
        raise TransientError(f"the answer is not one of a store: it has no {' and no '.join(missing)}")
    return answer


def _extent(answer: dict[str, Any], at: int, wanted: int | None, ranged: bool) -> tuple[int, int]:
    """(bytes to skip, bytes to keep) of an answer, also when the server sends all in spite of a range."""
    size = int(answer["ContentLength"])
    if not ranged:
        return 0, size
    if "ContentRange" in answer:
        unit, _, rest = str(answer["ContentRange"]).partition(" ")
        first = rest.partition("-")[0]
        if unit != "bytes" or first != str(at):
            raise StorageError(f"the server answered a range from byte {at} with {answer['ContentRange']!r}")
        return 0, size
    events.count("storage.range_ignored", at=at, size=size)
    keep = max(0, size - at)
    return at, keep if wanted is None else min(keep, wanted)


def _slice(data: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(data, bytes):
        return data[start : start + length]
    with data.open("rb") as file:
        file.seek(start)
        return file.read(length)
