"""How fast the data tools turn videos into shards, stage by stage, against bare ffmpeg in the same run.

    python benchmarks/build.py [--videos FOLDER] [--size 256] [--clips 2000] [--rounds 3] [--json FILE]
    python benchmarks/build.py --encoder tiny        # and the latent rows, with an untrained AR-VAE of that preset

Without --videos, H.264 clips of 640x360 at 30 frames/s are made first. Every rate is frames per second of wall time
with all cores, the median of rounds in which the stages take turns; the ratio is to ffmpeg decoding, scaling and
cropping the same videos to /dev/null by itself, in the same round. The encode stage stands beside the bare network on
the same frames: float32 batches that are ready, nothing checked, nothing stored. With --encoder the size is that of
the preset.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from ardist.data.sample import SampleInfo
from ardist.data.shard_writer import Sample, write_shard
from ardist.media import ffmpeg_binary
from ardist.models.ar_vae.model import ARVAE, preset
from ardist.models.weights import save_ar_vae
from data_tools.build import BuildOptions, build, make_parameters
from data_tools.decode import DecodeSettings, Target, decode_stretch, stretches
from data_tools.encode import EncoderChoice, LatentEncoder, default_threads
from data_tools.ffmpeg_graph import SCALE_FLAGS
from data_tools.probe import ProbeCaps, VideoFacts
from data_tools.probe_pool import probe_all
from data_tools.reasons import Refusal
from data_tools.shard import ShardSettings
from data_tools.sources import list_sources

CAPS = ProbeCaps(8192 * 4320, 24 * 3600, 8)
FRAMES = 16
CEILING = "ffmpeg: decode, our filters"
NETWORK = "AR-VAE encoder alone"


def make_videos(folder: Path, count: int, frames: int) -> None:
    """Noisy, moving H.264 videos that cost what real ones cost to decode."""
    for number in range(count):
        source = f"testsrc2=s=640x360:r=30,noise=alls=12:allf=t:all_seed={number}"
        words = ["-f", "lavfi", "-i", source, "-frames:v", str(frames), "-c:v", "libx264", "-preset", "veryfast"]
        words += ["-crf", "26", "-g", "60", "-pix_fmt", "yuv420p", str(folder / f"{number:03d}.mp4")]
        subprocess.run([ffmpeg_binary(), "-loglevel", "error", "-y", *words], check=True)


def timed(work: Callable[[], int]) -> float:
    """Frames per second of a piece of work that returns how many frames it handled."""
    begun = time.perf_counter()
    frames = work()
    return frames / (time.perf_counter() - begun)


def in_parallel(work: Callable[[Any], int], items: Iterable[Any], threads: int) -> int:
    """Sum of `work` over the items, a few at a time."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, items))


def bare(item: tuple[Path, int], filters: str) -> int:
    """ffmpeg alone, from a file to /dev/null."""
    path, count = item
    words = ["-threads", "1", "-i", str(path), "-frames:v", str(count), *(["-vf", filters] if filters else [])]
    command = [ffmpeg_binary(), "-nostdin", "-loglevel", "error", "-y", *words, "-an", "-f", "rawvideo"]
    subprocess.run([*command, *(["-pix_fmt", "rgb24"] if filters else []), "/dev/null"], check=True)
    return count


def ours(item: tuple[Path, VideoFacts, int], size: int) -> int:
    """The decode stage alone."""
    path, facts, count = item
    target = Target(FRAMES, Fraction(facts.rate), size, CAPS.max_pixels)
    starts = list(range(0, count - FRAMES + 1, FRAMES))
    total = 0
    for stretch in stretches(starts, target, bool(facts.keyframes)):
        for _, frames in decode_stretch(str(path), None, facts, stretch, target, DecodeSettings()):
            assert not isinstance(frames, Refusal), frames
            total += len(frames)
    return total


def write_alone(folder: Path, size: int, clips: int) -> int:
    """Hash, tar, index and sync of clips that are ready."""
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, size, size, 3), np.uint8)
    info = SampleInfo(source="x", frames=FRAMES)
    write_shard(folder, 0, (Sample(f"{n:016x}", frames, info) for n in range(clips)), "uint8", with_sums=False)
    shutil.rmtree(folder / "shards")
    return clips * FRAMES


def encode_alone(bundle: Path, frames: int, size: int) -> int:
    """The autoencoder on frames that are ready."""
    encoder = EncoderChoice(str(bundle)).make()
    data = np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), np.uint8)
    return sum(1 for _ in encoder.encode(data, range(0, frames - FRAMES + 1, FRAMES), FRAMES)) * FRAMES


def network_alone(bundle: Path, frames: int, size: int) -> int:
    """What the encode stage cannot be faster than."""
    encoder = EncoderChoice(str(bundle)).make()
    assert isinstance(encoder, LatentEncoder)
    data = torch.rand(1, encoder.batch_frames, 3, size, size)
    with torch.inference_mode():
        for _ in range(frames // encoder.batch_frames):
            encoder.model.posterior(data).mode()
    return frames // encoder.batch_frames * encoder.batch_frames


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process, none when it has just ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


class MemoryWatch:
    """Resident memory of this process and its children (shared pages counted in each), sampled over time."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(0.2):
            self.samples.append(sum(resident(each) for each in (me, *me.children(recursive=True))))

    def quarters(self) -> tuple[float, float]:
        """Largest MiB in the second and in the last quarter of the time: equal when memory is flat."""
        n = len(self.samples)
        if n < 8:
            return float("nan"), float("nan")
        return max(self.samples[n // 4 : n // 2]) / 2**20, max(self.samples[3 * n // 4 :]) / 2**20


def end_to_end(videos: Path, out: Path, choice: EncoderChoice, size: int, clips: int) -> tuple[float, MemoryWatch]:
    """A whole build in frames per second, probing, planning and verification of the plan included."""
    shutil.rmtree(out, ignore_errors=True)
    parameters = make_parameters(choice.make(), num_frames=FRAMES, size=size, stride=FRAMES, limit_clips=clips)
    options = BuildOptions(shard=ShardSettings(decoders=default_threads()))
    with MemoryWatch() as watch:
        rate = timed(
            lambda: build(str(videos), str(out), choice, parameters, options=options).manifest.num_samples * FRAMES
        )
    shutil.rmtree(out)
    return rate, watch


def main() -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of videos; without: made on the spot")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--clips", type=int, default=2000, help="most clips of the end-to-end builds")
    parser.add_argument("--bundle", type=Path, help="AR-VAE bundle for the latent rows")
    parser.add_argument("--encoder", help="instead of a bundle: preset of an untrained AR-VAE")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are shown")
    parser.add_argument("--stage-frames", type=int, default=1600, help="most frames of a video in the single stages")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    words = parser.parse_args()
    cores = default_threads()
    with tempfile.TemporaryDirectory(prefix="ardist-bench-") as folder:
        if words.encoder is not None:
            model = ARVAE(preset(words.encoder))
            words.bundle, words.size = Path(folder) / "bundle", model.config.image_size
            save_ar_vae(words.bundle, model)
        videos = words.videos or Path(folder) / "videos"
        if words.videos is None:
            videos.mkdir()
            make_videos(videos, 2 * cores, max(160, words.clips * FRAMES // (2 * cores)))
        root, listed = list_sources(str(videos))
        paths = [Path(root.path(item.name)) for item in listed if item.refused is None]
        facts = list(probe_all([(str(path), None, path.stat().st_size) for path in paths], CAPS, cores, 60))
        items = [(path, found) for path, found in zip(paths, facts, strict=True) if isinstance(found, VideoFacts)]
        counts = [min(words.stage_frames, found.timeline().grid_length(None)) // FRAMES * FRAMES for _, found in items]
        used = [(path, count) for (path, _), count in zip(items, counts, strict=True)]
        ready = [(path, found, count) for (path, found), count in zip(items, counts, strict=True)]
        scale = f"scale='if(gte(dar,1),round({words.size}*dar),{words.size})'"
        scale += f":'if(gte(dar,1),{words.size},round({words.size}/dar))':flags="
        crop = f"crop={words.size}:{words.size}"
        alone = {
            "ffmpeg: decode only": "",
            "ffmpeg: decode, fast bicubic": f"{scale}bicubic,{crop}",
            CEILING: f"{scale}{SCALE_FLAGS},format=gbrp,{crop}",
        }
        stages: dict[str, Callable[[], int]] = {
            name: functools.partial(in_parallel, functools.partial(bare, filters=filters), used, cores)
            for name, filters in alone.items()
        }
        stages["decode stage"] = functools.partial(in_parallel, functools.partial(ours, size=words.size), ready, cores)
        stages["write stage"] = functools.partial(write_alone, Path(folder), words.size, 200)
        if words.bundle is not None:
            stages[NETWORK] = functools.partial(network_alone, words.bundle, 512, words.size)
            stages["encode stage"] = functools.partial(encode_alone, words.bundle, 512, words.size)
        rounds = [{name: timed(stage) for name, stage in stages.items()} for _ in range(words.rounds)]
        rates = {name: statistics.median(one[name] for one in rounds) for name in stages}
        ratios = {name: statistics.median(one[name] / one[CEILING] for one in rounds) for name in stages}
        rates["build, pixels"], watch = end_to_end(
            videos, Path(folder) / "out", EncoderChoice(), words.size, words.clips
        )
        before, after = watch.quarters()
        if words.bundle is not None:
            choice = EncoderChoice(str(words.bundle))
            rates["build, latents"], _ = end_to_end(videos, Path(folder) / "out", choice, words.size, words.clips)
    table = Table(title=f"{len(items)} videos, {words.size}x{words.size}, {cores} cores")
    for name in ("", "frames/s", f"clips/s of {FRAMES}", "to ffmpeg"):
        table.add_column(name, justify="right" if name else "left")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.0f}", f"{rate / FRAMES:.1f}", f"{ratios.get(name, rate / rates[CEILING]):.2f}")
    Console().print(table)
    if words.bundle is not None:
        share = statistics.median(one["encode stage"] / one[NETWORK] for one in rounds)
        Console().print(f"encode stage: {share:.2f} of the encoder alone")
    Console().print(f"memory of the pixel build: {before:.0f} MiB in its second quarter, {after:.0f} MiB in its last")
    if words.json is not None:
        words.json.write_text(
            json.dumps({"rates": rates, "ratios": ratios, "rss_mib": [before, after], "cores": cores}, indent=1)
        )


if __name__ == "__main__":
    main()
