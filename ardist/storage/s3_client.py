"""The S3 client of this process, and what its errors mean: try again, refresh credentials, or tell the user."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ardist.storage.base import DeniedObjectError, MissingObjectError, StorageError, UnreadableObjectError
from ardist.storage.retry import TransientError

T = TypeVar("T")

CONNECT_SECONDS, READ_SECONDS = 10, 60
_TRY_AGAIN = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException"}
_TRY_AGAIN |= {"OperationAborted", "ConditionalRequestConflict", "RequestThrottled", "BandwidthLimitExceeded"}
_TRY_AGAIN_STATUS = {408, 429, 500, 502, 503, 504}
_STALE_CREDENTIALS = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_STALE_CREDENTIALS |= {"RequestExpired", "InvalidToken"}
_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "AccountProblem", "NotSignedUp"}
_BAD_CREDENTIALS |= {"AuthorizationHeaderMalformed", "MissingSecurityHeader", "AllAccessDisabled"}
_OF_THE_OBJECT = ("InvalidObjectState", "InvalidRequest", "KMS.")
"""How codes begin that concern one object: in an archive, or encrypted with a key of its own."""

_MISSING = {"NoSuchKey", "404", "NotFound", "NoSuchBucket"}


class Clients:
    """boto3 clients of this process, one per set of AWS settings: they are costly to make and safe to share.

    A client does not survive a fork, so the process number is part of what it is kept under.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[Any, ...], Any] = {}

    def get(self) -> Any:
        """A client from the default credential chain and AWS_ENDPOINT_URL, made on first use."""
        key = _settings()
        with self._lock:
            if key not in self._kept:
                # Those of other processes and settings are not closed: a parent may still be using its own.
                self._kept = {key: _make_client()}
            return self._kept[key]

    def refresh(self, stale: Any) -> None:
        """Forget a client whose credentials were refused, so that the next one asks for them anew."""
        with self._lock:
            self._kept = {key: client for key, client in self._kept.items() if client is not stale}


clients = Clients()
"""The process-wide clients."""


def _settings() -> tuple[Any, ...]:
    return (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def _make_client() -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=64,
        tcp_keepalive=True,
        # We repeat by ourselves, so that every repeat is counted and bounded in one place.
        retries={"total_max_attempts": 1, "mode": "standard"},
        # Servers other than Amazon's know neither the trailing checksums nor bucket names in the host.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if endpoint else "auto"},
        user_agent_extra="ardist",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise StorageError(f"no S3 client: {error}") from error


class PreconditionError(Exception):
    """The store refused a conditional request: the object is, or is not, there."""


def attempt(address: str, refreshed: list[bool], request: Callable[[Any], T]) -> T:
    """One try of `request(client)`, with errors sorted: `TransientError`, or the final error for the user.

    `refreshed` is the memory of one operation: stale credentials are refreshed once.
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.parsers import ResponseParserError

    client = clients.get()
    try:
        return request(client)
    except ClientError as error:
        raise _sorted(error.response, lambda: clients.refresh(client), address, refreshed) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise StorageError(
            f"{address}: no S3 credentials found; "
            "legal: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role"
        ) from None
    except (HTTPClientError, BotoConnectionError, ResponseParserError, ConnectionError, TimeoutError) as error:
        raise TransientError(_plain(error)) from error
    except BotoCoreError as error:
        raise StorageError(f"{address}: {_plain(error)}") from None


def _sorted(response: dict[str, Any], refresh: Callable[[], None], address: str, refreshed: list[bool]) -> Exception:
    code = str(response.get("Error", {}).get("Code", ""))
    meta = response.get("ResponseMetadata", {})
    status = int(meta.get("HTTPStatusCode", 0))
    if code in _MISSING or status == 404:
        what = "the bucket does not exist" if code == "NoSuchBucket" else "does not exist"
        return MissingObjectError(f"{address}: {what}" if code == "NoSuchBucket" else f"{address} {what}")
    if code in ("PreconditionFailed", "412") or status in (412, 304):
        return PreconditionError(address)
    if code in _STALE_CREDENTIALS:
        if not refreshed:
            refreshed.append(True)
            refresh()
            return TransientError(f"{code}, credentials refreshed", retry_after=0.0)
        return StorageError(
            f"{address}: refused with {code}, also after fresh credentials; renew them or set the clock"
        )
    if code in _TRY_AGAIN or status in _TRY_AGAIN_STATUS or (status == 409 and code != "BucketAlreadyExists"):
        return TransientError(f"{code or status}", retry_after=_retry_after(meta.get("HTTPHeaders", {})))
    if code in ("InvalidRange", "416") or status == 416:
        return RangeError(address)
    if code.startswith(_OF_THE_OBJECT):
        return UnreadableObjectError(f"{address}: cannot be read as it is stored ({code})")
    if status in (401, 403):
        kind = StorageError if status == 401 or code in _BAD_CREDENTIALS else DeniedObjectError
        return kind(f"{address}: access denied ({code or status}); these credentials may not do this here")
    return StorageError(f"{address}: refused with {code or 'status'} ({status})")


class RangeError(Exception):
    """The range begins beyond the object's end."""


def _retry_after(headers: dict[str, str]) -> float | None:
    text = headers.get("retry-after")
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None  # the date form is not worth trusting two clocks for


def _plain(error: Exception) -> str:
    """Name and message without query strings, which may carry signatures."""
    text = " ".join(str(error).split())
    words = [word.split("?", 1)[0] if "://" in word else word for word in text.split(" ")]
    return f"{type(error).__name__}: {' '.join(words)}"[:300]
