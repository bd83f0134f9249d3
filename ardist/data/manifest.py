"""``manifest.json``: the only truth about a dataset that a trainer reads; never edited in place."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ardist.config.base import canonical_digest
from ardist.data.errors import ManifestError
from ardist.data.sample import SampleDtype
from ardist.storage import open_storage

MANIFEST_NAME: Final = "manifest.json"
SCHEMA_VERSION: Final = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=2**63)]
ContextShape = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
_SHARD_NAME: Final = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_serializer(mode="wrap")
    def _without_what_came_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A dataset without text embeddings has the bytes and the digest that it had before there were any."""
        fields: dict[str, Any] = serialize(self)
        if fields.get("context_shape", ()) is None:
            del fields["context_shape"]
        return fields


class Sums(_Record):
    """Sums of a shard's values per channel (last axis), from which the dataset's mean and deviation are folded."""

    count: Count = Field(description="values per channel")
    total: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Sums:
        """Float64 sums over all axes but the last of an array of real numbers [..., C]."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        return cls(count=len(flat), total=tuple(flat.sum(0).tolist()), squares=tuple((flat * flat).sum(0).tolist()))


class ShardEntry(_Record):
    """One shard of the dataset; its index has the same name with ``.idx``."""

    name: str = Field(description="tar, relative to the manifest: shards/shard-000123-<8 hex of its sha256>.tar")
    n: Count
    bytes: Count
    sha256: Sha256
    index_sha256: Sha256
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: SampleDtype
    context_shape: ContextShape | None = None
    sums: Sums | None = None

    @property
    def index_name(self) -> str:
        """Name of the index, relative to the manifest."""
        return self.name.removesuffix(".tar") + ".idx"

    @model_validator(mode="after")
    def _plain_name(self) -> ShardEntry:
        if _SHARD_NAME.fullmatch(self.name) is None:
            raise ValueError(f"shard name {self.name!r} is not a plain relative path that ends in .tar")
        return self


class VAEIdentity(_Record):
    """Which autoencoder made the latents."""

    weights_digest: Sha256
    config_digest: Sha256


class LatentStatistics(_Record):
    """Mean and standard deviation per channel over all latents, and how many values per channel were counted."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: Count


class Manifest(_Record):
    """A dataset: what it holds, how it was made, and its shards in their order."""

    schema_version: Literal[1] = 1
    dataset_id: str = Field(min_length=1, max_length=200)
    created: str = Field(description="UTC time, ISO 8601; not part of the digest")
    code_version: str
    kind: Literal["latents", "pixels"]
    vae: VAEIdentity | None = None
    tools: dict[str, str] = Field(default_factory=dict)
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    latent_statistics: LatentStatistics | None = None
    num_samples: Count
    num_bytes: Count
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(description="[F, L, C] latents or [F, H, W, 3] pixels")
    dtype: SampleDtype
    context_shape: ContextShape | None = Field(None, description="[K, D] of the text embeddings, if there are any")
    classes: tuple[str, ...] | None = None
    parent: Sha256 | None = Field(None, description="digest of the manifest this one extends")
    shards: tuple[ShardEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        problems = [*self._kind_problems(), *self._shard_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _kind_problems(self) -> Iterable[str]:
        if self.kind == "latents":
            if len(self.shape) != 3 or self.dtype == "uint8":
                yield f"latents are float16 or bfloat16 [F, L, C], not {self.dtype} {list(self.shape)}"
            if self.vae is None:
                yield "a latent dataset must name its VAE"
        elif len(self.shape) != 4 or self.shape[-1] != 3 or self.dtype != "uint8":
            yield f"pixels are uint8 [F, H, W, 3], not {self.dtype} {list(self.shape)}"
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            yield "a class name stands in classes twice"
        statistics = self.latent_statistics
        if statistics is not None:
            if not len(statistics.mean) == len(statistics.std) == self.shape[-1]:
                yield f"latent_statistics must have {self.shape[-1]} channels"
            if not all(map(math.isfinite, (*statistics.mean, *statistics.std))) or min(statistics.std, default=1) <= 0:
                yield "latent_statistics must be finite with positive deviations"

    def _shard_problems(self) -> Iterable[str]:
        for field, name in (("n", "num_samples"), ("bytes", "num_bytes")):
            total = sum(getattr(shard, field) for shard in self.shards)
            if total != getattr(self, name):
                yield f"{name} is {getattr(self, name)}, but the shards' {field} sum to {total}"
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            twice = Counter(names).most_common(1)[0][0]
            yield f"shard {twice} is listed twice"
        other = [shard.name for shard in self.shards if (shard.shape, shard.dtype) != (self.shape, self.dtype)]
        if other:
            yield f"{len(other)} shards are not {self.dtype} {list(self.shape)}: {', '.join(other[:3])}"
        other = [shard.name for shard in self.shards if shard.context_shape != self.context_shape]
        if other:
            context = "no context" if self.context_shape is None else f"context {list(self.context_shape)}"
            yield f"{len(other)} shards do not have the dataset's {context}: {', '.join(other[:3])}"

    def digest(self) -> str:
        """sha256 of the content (everything but `created`): the same build gives the same digest."""
        return canonical_digest(self.model_dump(mode="json", exclude={"created"}))

    def dump(self) -> bytes:
        """The bytes of ``manifest.json``: readable, one shard per line, the same for equal manifests."""
        head = self.model_dump(mode="json", exclude={"shards"})
        lines = ",\n".join(
            "  " + json.dumps(shard.model_dump(mode="json"), ensure_ascii=False, allow_nan=False)
            for shard in self.shards
        )
        text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
        return (text.removesuffix("\n}") + f',\n "shards": [\n{lines}\n ]\n}}\n').encode()


def parse_manifest(data: bytes, source: str) -> Manifest:
    """Check the bytes of a ``manifest.json``; `ManifestError` names `source` and every problem."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source} is not JSON: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ManifestError(f"{source} has schema version {version!r}; this program reads version {SCHEMA_VERSION}")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()[:20]
        ]
    raise ManifestError(f"{source} is not a valid manifest:\n" + "\n".join(problems))


def load_manifest(url: str | os.PathLike[str]) -> Manifest:
    """Read and check ``manifest.json`` of a dataset folder or ``s3://`` prefix."""
    storage = open_storage(os.fspath(url))
    return parse_manifest(storage.read(MANIFEST_NAME), f"{storage.url}/{MANIFEST_NAME}")


def fold_statistics(shards: Sequence[ShardEntry]) -> LatentStatistics | None:
    """Mean and population deviation per channel from the shards' sums; None when a shard has none.

    Exactly rounded sums make the result independent of the order of the shards.
    """
    sums = [shard.sums for shard in shards if shard.sums is not None]
    if not sums or len(sums) != len(shards):
        return None
    channels = range(len(sums[0].total))
    count = sum(part.count for part in sums)
    mean = [math.fsum(part.total[c] for part in sums) / count for c in channels]
    square = [math.fsum(part.squares[c] for part in sums) / count for c in channels]
    deviation = [math.sqrt(max(square[c] - mean[c] ** 2, 0.0)) for c in channels]
    return LatentStatistics(mean=tuple(mean), std=tuple(deviation), count=count)


def fold_shards(shards: Iterable[ShardEntry], **header: Any) -> Manifest:
    """The manifest of these shards, sorted by name: counts, shape and latent statistics are folded from them.

    `header` gives the remaining fields (dataset_id, created, code_version, kind, vae, tools, ...). A pure function:
    the same shards in any order give the same manifest. Raises `ManifestError`.
    """
    entries = sorted(shards, key=lambda shard: shard.name)
    if not entries:
        raise ManifestError("a dataset needs at least one shard")
    statistics = fold_statistics(entries) if header.get("kind") == "latents" else None
    if statistics is not None and min(statistics.std) <= 0:
        raise ManifestError(f"a latent channel is constant over the whole dataset: deviations {list(statistics.std)}")
    fields: dict[str, Any] = {
        "num_samples": sum(shard.n for shard in entries),
        "num_bytes": sum(shard.bytes for shard in entries),
        "shape": entries[0].shape,
        "dtype": entries[0].dtype,
        "context_shape": entries[0].context_shape,
        "latent_statistics": statistics,
        "shards": tuple(entries),
    }
    try:
        return Manifest(**{**fields, **header})
    except ValidationError as error:
        details = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ManifestError(f"these shards do not make a dataset: {details}") from None


def check_manifest(manifest: Manifest, expected: Mapping[str, Any], source: str = "the dataset") -> None:
    """Compare a manifest with what the run was started with; `ManifestError` lists every difference.

    `expected` may hold ``kind``, ``shape``, ``dtype``, ``context_shape``, ``vae_weights_digest``,
    ``vae_config_digest``, ``num_classes`` (at least as many as the manifest's classes) and ``digest``; a value of None
    is not compared, and so is a None inside a shape.
    """
    legal = {
        "kind",
        "shape",
        "dtype",
        "context_shape",
        "vae_weights_digest",
        "vae_config_digest",
        "num_classes",
        "digest",
    }
    if unknown := set(expected) - legal:
        raise TypeError(f"nothing called {sorted(unknown)} can be checked; legal: {sorted(legal)}")
    found: dict[str, Any] = {
        "kind": manifest.kind,
        "shape": manifest.shape,
        "dtype": manifest.dtype,
        "context_shape": manifest.context_shape,
        "vae_weights_digest": manifest.vae and manifest.vae.weights_digest,
        "vae_config_digest": manifest.vae and manifest.vae.config_digest,
        "num_classes": len(manifest.classes or ()),
        "digest": manifest.digest() if expected.get("digest") is not None else None,
    }
    problems = [
        f"  {name}: the dataset has {_shown(found[name])}, the run needs {_shown(value)}"
        for name, value in expected.items()
        if value is not None and not _fits(name, found[name], value)
    ]
    if problems:
        raise ManifestError(f"{source} does not fit this run:\n" + "\n".join(problems))


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fits(name: str, found: Any, expected: Any) -> bool:
    if name == "num_classes":
        return bool(found <= expected)
    if name == "shape":
        return len(found) == len(expected) and all(b in (None, a) for a, b in zip(found, expected, strict=True))
    return bool(found == expected)


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Write ``manifest.json`` into a local dataset folder (temporary file, fsync, rename)."""
    target = Path(directory) / MANIFEST_NAME
    temporary = target.with_name(f".{MANIFEST_NAME}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(manifest.dump())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    return target
