"""From a bundle to mp4 files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_cases import make_ar_vae, make_bundle
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from ardist.errors import ArdistError, InvalidValueError
from ardist.inference import sample
from ardist.inference.bundle import Bundle, load_bundle
from ardist.inference.sample import sample_to_file
from ardist.inference.video_io import Mp4Writer, read_frames, write_mp4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles")
    return make_bundle(place / "bundle", make_ar_vae(place / "vae"), num_classes=3)


def coarse(frames: NDArray[Any]) -> NDArray[np.float64]:
    """Brightness of 4x4 blocks: what a codec with coarse colour keeps of noise."""
    f, h, w, _ = frames.shape
    return frames.astype(float).reshape(f, h // 4, 4, w // 4, 4, 3).mean(axis=(2, 4, 5))


def difference(first: Path, second: Path) -> float:
    return float(np.abs(coarse(read_frames(first)) - coarse(read_frames(second))).mean())


def test_the_file_shows_what_the_sampler_makes(bundle: Path, tmp_path: Path) -> None:
    (path,) = sample_to_file(bundle, tmp_path / "a.mp4", seed=3, class_id=1, guidance_scale=2, device="cpu")
    opened = load_bundle(bundle)
    shown = read_frames(path)
    assert shown.shape == (4, 16, 16, 3)
    own, other = (
        np.abs(coarse(shown / 255) - coarse(decoded(opened, seed=seed, class_id=class_id))).mean()
        for seed, class_id in ((3, 1), (4, 0))
    )
    assert own < 0.02
    assert own < 0.4 * other, "another video differs, so the comparison means something"


def decoded(opened: Bundle, seed: int, class_id: int) -> np.ndarray:
    """Pixels [f h w 3] of the video that the sampler makes."""
    latents = opened.sampler().sample(
        4, num_inference_steps=5, difference=2, seed=seed, class_ids=torch.tensor([class_id]), guidance_scale=2
    )
    with torch.no_grad():
        pixels: np.ndarray = opened.ar_vae.decode(latents)[0].permute(0, 2, 3, 1).numpy()
    return pixels


def test_streamed_and_whole_videos_are_the_same(bundle: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"num_frames": 9, "difference": 5, "device": "cpu"}
    (whole,) = sample_to_file(bundle, tmp_path / "whole.mp4", **arguments)
    (streamed,) = sample_to_file(bundle, tmp_path / "streamed.mp4", stream=True, **arguments)
    assert len(read_frames(whole)) == 9
    assert difference(whole, streamed) < 0.5


def test_several_videos_are_numbered_and_each_is_its_own(bundle: Path, tmp_path: Path) -> None:
    three = sample_to_file(bundle, tmp_path / "v.mp4", num_videos=3, device="cpu")
    assert [path.name for path in three] == ["v-0.mp4", "v-1.mp4", "v-2.mp4"]
    (alone,) = sample_to_file(bundle, tmp_path / "alone.mp4", device="cpu")
    assert difference(three[0], alone) < 0.5
    assert difference(three[0], three[1]) > 1


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_prefix_is_where_the_video_starts(bundle: Path, tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(0)
    clip = generator.integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
    if kind == "image":
        prefix, given = tmp_path / "p.png", 1
        Image.fromarray(clip[0]).save(prefix)
    else:
        prefix, given = tmp_path / "p.mp4", 2
        write_mp4(prefix, clip)
    paths = {
        seed: sample_to_file(bundle, tmp_path / f"{seed}.mp4", prefix=prefix, num_frames=6, seed=seed, device="cpu")[0]
        for seed in (0, 1)
    }
    first, second = (coarse(read_frames(path)) for path in paths.values())
    assert len(first) == 6
    by_frame = np.abs(first - second).mean(axis=(1, 2))
    assert by_frame[:given].max() < 1
    assert by_frame[given:].mean() > 4
    opened = load_bundle(bundle)
    pixels = torch.from_numpy(read_frames(prefix, 16, given, last=True)).permute(0, 3, 1, 2)[None] / 255
    with torch.no_grad():
        expected = opened.ar_vae.decode(opened.ar_vae.encode(pixels))[0].permute(0, 2, 3, 1).numpy()
    assert np.abs(first[:given] / 255 - coarse(expected)).mean() < 0.02


def test_a_prefix_shorter_than_asked_for_is_refused(bundle: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "p.mp4"
    write_mp4(prefix, np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8))
    request: dict[str, Any] = {"prefix": prefix, "num_frames": 6, "device": "cpu"}
    with pytest.raises(InvalidValueError, match=r"prefix_frames=4 is illegal: '.*p\.mp4' has 3 frames; legal: 1 to 3"):
        sample_to_file(bundle, tmp_path / "a.mp4", prefix_frames=4, **request)
    assert not (tmp_path / "a.mp4").exists()
    (path,) = sample_to_file(bundle, tmp_path / "a.mp4", prefix_frames=3, **request)
    assert len(read_frames(path)) == 6


def test_nothing_is_decoded_before_the_settings_are_known_to_be_legal(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, written = tmp_path / "p.png", []
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(prefix)
    monkeypatch.setattr(Mp4Writer, "write", lambda writer, frames: written.append(len(frames)))
    with pytest.raises(InvalidValueError, match="difference=6"):
        sample_to_file(bundle, tmp_path / "a.mp4", prefix=prefix, difference=6, stream=True, device="cpu")
    assert not written


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    monkeypatch.setattr(sample, "console", Console(file=shown, force_terminal=terminal, width=120, no_color=True))
    sample_to_file(bundle, tmp_path / "a.mp4", num_videos=2, device="cpu")
    last = re.findall(r"videos 0-1\D.*?(\d+)/(\d+) frames, (\d+\.\d\d) frames/s", shown.getvalue())[-1:]
    if terminal:
        assert [(done, total) for done, total, _ in last] == [("4", "4")]
        assert float(last[0][2]) > 0
    else:
        assert not shown.getvalue().strip()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ({"out": Path("a.avi")}, 2, "ends in .mp4"),
        ({"num_videos": 0}, 2, "num_videos=0"),
        ({"device": "tpu"}, 2, "legal: cpu, cuda"),
        ({"device": "cuda:99"}, 4, "cuda:99"),
        ({"class_id": 7}, 2, "class_ids contains 7; legal: 0 to 2"),
        ({"guidance_scale": 3}, 2, "needs a condition"),
        ({"num_inference_steps": 3}, 2, "num_steps=3"),
        ({"difference": 9}, 2, "difference=9"),
        ({"prefix": Path("nothing.mp4")}, 3, "nothing.mp4"),
        ({"prefix_frames": 4, "prefix": Path("nothing.mp4")}, 2, "prefix_frames=4"),
        ({"prefix_frames": 2}, 2, "prefix_frames=2 is illegal without a prefix"),
        ({"fps": float("nan"), "bundle": Path("nothing")}, 2, "fps=nan"),
        ({"bundle": Path("nothing")}, 3, "no bundle"),
        ({"weights": "best"}, 2, "weights='best'"),
    ],
)
def test_illegal_requests_are_one_message_with_its_exit_code(
    bundle: Path, tmp_path: Path, arguments: dict[str, Any], code: int, message: str
) -> None:
    request: dict[str, Any] = {"bundle": bundle, "out": tmp_path / "a.mp4", "device": "cpu"} | arguments
    with pytest.raises(ArdistError, match=message) as caught:
        sample_to_file(**request)
    assert caught.value.exit_code == code
    assert list(tmp_path.iterdir()) == []
