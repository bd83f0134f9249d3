"""Where a sample came from, and what it looks like beside its source."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ardist.data.manifest import Manifest, ShardEntry, load_manifest
from ardist.data.sample import SampleInfo, decode_npy, key_to_int
from ardist.data.tar_index import TarIndex
from ardist.errors import ArdistError, ConfigError, DataError
from ardist.media import ffmpeg_binary
from ardist.storage import Storage, open_storage
from data_tools import layout
from data_tools.decode import DecodeSettings, Target, decode_stretch
from data_tools.fetch import local_copy
from data_tools.frame_stream import Frames
from data_tools.groups import datasets_at
from data_tools.plan import load_plan
from data_tools.reasons import Refusal
from data_tools.sources import SourceRoot

_MAX_JSON = 2**20


class MissingSampleError(DataError):
    """No shard holds this key."""


@dataclass(frozen=True)
class Found:
    """One sample of a dataset."""

    manifest: Manifest
    shard: ShardEntry
    row: int
    offset: int
    info: SampleInfo
    array: Any


def find(url: str, key: str) -> Found:
    """The sample with a key; raises `DataError` when no shard holds it, `InvalidValueError` for no key."""
    bits = np.uint64(key_to_int(key))
    storage, manifest = open_storage(url), load_manifest(url)
    for shard in manifest.shards:
        index = TarIndex.open(storage.read(shard.index_name), name=shard.name, n=shard.n, tar_size=shard.bytes)
        rows = np.flatnonzero(index.records["key"] == bits)
        if len(rows):
            record = index.records[int(rows[0])]
            offset, size = int(record["offset"]), int(record["size"])
            array = decode_npy(storage.read(shard.name, offset, size), shard.shape, shard.dtype)
            info = _info(storage, shard, key, offset, size)
            return Found(manifest, shard, int(rows[0]), offset, info, array)
    raise MissingSampleError(f"no sample {key} in the {len(manifest.shards)} shards of {storage.url}")


def locate(url: str, key: str) -> tuple[str, Found]:
    """The address of the dataset, of the one or of the groups at `url`, that holds a key, and its sample."""
    addresses = datasets_at(url)
    for address in addresses[:-1]:
        with contextlib.suppress(MissingSampleError):
            return address, find(address, key)
    return addresses[-1], find(addresses[-1], key)


def _info(storage: Storage, shard: ShardEntry, key: str, offset: int, size: int) -> SampleInfo:
    """The json member, which follows the array in our tars."""
    at = offset + -(-size // 512) * 512
    head = storage.read(shard.name, at, 512)
    if head[:100].rstrip(b"\0").decode("latin1") != f"{key}.json":
        raise DataError(f"{shard.name}: no {key}.json follows the array at byte {at}")
    length = int(head[124:135].decode("ascii"), 8)
    if length > _MAX_JSON:
        raise DataError(f"{shard.name}: {key}.json claims {length} bytes")
    return SampleInfo.model_validate_json(storage.read(shard.name, at + 512, length))


def describe(found: Found) -> dict[str, str]:
    """Provenance, line by line."""
    manifest, info = found.manifest, found.info
    lines = {
        "source": info.source,
        "span": f"{info.frames} frames from {info.start:.3f} s at {info.fps} frames/s",
        "class": "none" if info.class_id is None else f"{info.class_id} ({(manifest.classes or ())[info.class_id]})",
        "caption": info.caption or "none",
        "stored as": f"{found.shard.dtype} {list(found.shard.shape)}",
        "values": f"{float(np.min(found.array)):.4g} to {float(np.max(found.array)):.4g}",
        "shard": f"{found.shard.name}, row {found.row}, byte {found.offset}",
        "dataset": f"{manifest.dataset_id} ({manifest.digest()[:16]}…)",
    }
    if manifest.vae is not None:
        lines["VAE"] = f"weights {manifest.vae.weights_digest[:16]}…, config {manifest.vae.config_digest[:16]}…"
    lines["tools"] = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    return lines


def write_clip(url: str, found: Found, path: Path, bundle: str | None) -> str:
    """Write an mp4: the source's own frames at the left where it can still be read, the stored clip at the right.

    Latents need `bundle`, the AR-VAE that made them. Returns what stands in the file.
    """
    stored = _stored_frames(found, bundle)
    try:
        source = _source_frames(url, found)
    except (Refusal, ArdistError) as error:
        _write_mp4(path, stored, found.info.fps or 1.0)
        return f"the stored clip alone; its source cannot be shown: {error}"
    _write_mp4(path, np.concatenate([source, stored], axis=2), found.info.fps or 1.0)
    return "source at the left, stored clip at the right"


def _stored_frames(found: Found, bundle: str | None) -> Frames:
    if found.manifest.kind == "pixels":
        return np.array(found.array)
    if bundle is None:
        raise ConfigError("latents can only be shown with --encoder BUNDLE, the AR-VAE that made them")
    import torch

    from data_tools.encode import LatentEncoder

    encoder = LatentEncoder(bundle, device="cpu", precision="fp32", batch_frames=1)
    if found.manifest.vae is None or encoder.identity.weights_digest != found.manifest.vae.weights_digest:
        raise ConfigError(f"--encoder {bundle!r} is not the AR-VAE that made this dataset")
    with torch.inference_mode():
        frames = encoder.model.decode(torch.from_numpy(np.array(found.array, np.float32))[None])[0]
    shown: Frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return shown


def _source_frames(url: str, found: Found) -> Frames:
    """Decode the clip's span again from the source, by the records of the build."""
    storage = open_storage(url)
    plan = load_plan(storage)
    if plan is None:
        raise DataError("the records of the build are not here")
    key = f"{int(np.uint64(_key(found, storage))):016x}"
    shard = layout.shard_number(found.shard.name)
    clips = plan.clips(shard) if shard is not None and shard < plan.num_shards else []
    clip = next((clip for clip in clips if clip.key == key), None)
    if clip is None:
        raise DataError(f"the plan holds no sample {key} in {found.shard.name}")
    video, parameters = clip.video, plan.parameters
    root = SourceRoot(plan.header.root)
    target = Target(parameters.num_frames, Fraction(clip.fps), parameters.size, parameters.max_pixels)
    with (
        tempfile.TemporaryDirectory() as folder,
        local_copy(root, video.name, video.version, Path(folder), video.facts.sha256) as (path, version),
    ):
        _, frames = next(decode_stretch(path, version, video.facts, [clip.start], target, DecodeSettings()))
    if isinstance(frames, Refusal):
        raise frames
    return frames


def _key(found: Found, storage: Storage) -> int:
    index = TarIndex.open(storage.read(found.shard.index_name), name=found.shard.name)
    return int(index.records[found.row]["key"])


def _write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """H.264 of uint8 [F, H, W, 3]; odd sizes are padded by a pixel, small ones shown larger."""
    _, height, width, _ = frames.shape
    zoom = max(1, 256 // height)
    words = [ffmpeg_binary(), "-y", "-nostdin", "-hide_banner", "-loglevel", "error"]
    words += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:.6f}", "-i", "pipe:0"]
    words += ["-vf", f"scale=iw*{zoom}:ih*{zoom}:flags=neighbor,pad=ceil(iw/2)*2:ceil(ih/2)*2", "-c:v", "libx264"]
    words += ["-pix_fmt", "yuv420p", "-crf", "14", "-f", "mp4", f"file:{path}"]
    done = subprocess.run(words, input=np.ascontiguousarray(frames).tobytes(), capture_output=True, check=False)
    if done.returncode:
        raise DataError(f"{path} could not be written: {done.stderr.decode('utf-8', 'replace').strip()[:300]}")
