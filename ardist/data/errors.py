"""What can be wrong with a shard, always named with the shard and the byte offset."""

from __future__ import annotations

from ardist.errors import DataError


class ShardError(DataError):
    """A shard, its index or one of its samples is missing or damaged.

    `reason` is one short word for counters: missing, length, checksum, header, nonfinite, index, member, name, order.
    """

    def __init__(self, shard: str, reason: str, detail: str, offset: int | None = None, key: str | None = None) -> None:
        self.shard, self.reason, self.detail, self.offset, self.key = shard, reason, detail, offset, key
        where = shard if offset is None else f"{shard} at byte {offset}"
        super().__init__(f"{where}{f' (sample {key})' if key else ''}: {detail}")


class ManifestError(DataError):
    """A manifest is unreadable, of another schema, contradicts itself or does not fit the run."""
