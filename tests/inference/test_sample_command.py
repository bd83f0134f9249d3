"""``ardist sample`` and ``ardist schedule`` as commands: the options arrive, the bundle's defaults are used."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from bundle_cases import make_ar_vae, make_bundle
from PIL import Image

from ardist import command_line
from ardist.cli import app
from ardist.inference import sample
from ardist.inference.sample import sample_to_file
from ardist.models.weights import is_bundle


def ardist(*words: object) -> int:
    return command_line.run(app, "ardist", [str(word) for word in words])


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    return make_bundle(root / "bundle", make_ar_vae(root / "ar-vae"), num_classes=3)


def test_what_is_not_given_comes_from_the_bundle(bundle: Path, tmp_path: Path) -> None:
    assert ardist("sample", "--bundle", bundle, "--out", tmp_path / "a.mp4") == 0
    assert frames_of(tmp_path / "a.mp4") == 4  # sampler_defaults.num_frames; S = 5 divides T where 50 is not asked for


def test_every_option_reaches_the_sampler(bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "start.png")
    words = ["--frames", 6, "--difference", 5, "--steps", 10, "--window", 3, "--window-kind", "rolling"]
    words += ["--prefix", tmp_path / "start.png", "--class-id", 2, "--guidance-scale", 2, "--seed", 7, "--fps", 4]
    out = tmp_path / "b.mp4"
    assert ardist("sample", "--bundle", bundle, "--out", out, "--num-videos", 2, "--stream", *words) == 0
    assert {path.name: frames_of(path) for path in tmp_path.glob("*.mp4")} == {"b-0.mp4": 6, "b-1.mp4": 6}


def test_every_option_is_handed_on_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, tokens, out = tmp_path / "start.png", tmp_path / "tokens.npy", tmp_path / "c.mp4"
    start.touch()
    tokens.touch()
    options: dict[str, tuple[str, object]] = {
        "num_frames": ("--frames", 6),
        "difference": ("--difference", 3),
        "num_inference_steps": ("--steps", 10),
        "window": ("--window", 5),
        "window_kind": ("--window-kind", "recompute"),
        "prefix": ("--prefix", start),
        "prefix_frames": ("--prefix-frames", 4),
        "class_id": ("--class-id", 2),
        "context": ("--context", tokens),
        "guidance_scale": ("--guidance-scale", 2.5),
        "seed": ("--seed", 7),
        "num_videos": ("--num-videos", 9),
        "fps": ("--fps", 12.5),
        "device": ("--device", "cuda:1"),
        "dtype": ("--dtype", "float16"),
    }
    keywords = inspect.signature(sample_to_file).parameters.values()
    defaults = {keyword.name: keyword.default for keyword in keywords if keyword.kind is keyword.KEYWORD_ONLY}
    received: list[dict[str, Any]] = []

    def recorded(*places: Path, **settings: Any) -> list[Path]:
        received.append({"places": places, **settings})
        return [out]

    monkeypatch.setattr(sample, "sample_to_file", recorded)
    words = [word for option in options.values() for word in option]
    places = {"places": (Path("some/bundle"), out)}
    line = ["sample", "--bundle", "some/bundle", "--out", out]
    assert ardist(*line, *words, "--stream", "--raw", "--compile") == 0
    told = {name: value for name, (_, value) in options.items()}
    assert received.pop() == places | told | {"stream": True, "weights": "raw", "compile": True}
    assert set(told) | {"stream", "weights", "compile"} == set(defaults)
    assert "".join(capsys.readouterr()).count("wrote") == 1
    assert ardist(*line) == 0
    assert received.pop() == places | defaults


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["--steps", 7], 2, "7"),
        (["--steps", 0], 2, "--steps"),
        (["--window", 0], 2, "--window"),
        (["--window-kind", "round"], 2, "rolling, recompute"),
        (["--difference", 6], 2, "6"),
        (["--fps", 0], 2, "fps=0"),
        (["--fps", "nan"], 2, "fps=nan"),
        (["--fps", "inf"], 2, "fps=inf"),
        (["--prefix-frames", 2], 2, "without a prefix"),
        (["--class-id", 9], 2, "9"),
        (["--prefix", "absent.png"], 2, "absent.png"),
        (["--context", "absent.npy"], 2, "absent.npy"),
        (["--dtype", "float8"], 2, "float32, bfloat16, float16"),
    ],
)
def test_refusals(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[object], code: int, shown: str
) -> None:
    assert ardist("sample", "--bundle", bundle, "--out", tmp_path / "x.mp4", *words) == code
    captured = capsys.readouterr().err
    assert shown in captured
    assert "Traceback" not in captured
    assert not list(tmp_path.iterdir())


def test_schedule_draws_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "schedule.png"
    assert ardist("schedule", "--frames", 20, "--difference", 5, "--window", 16, "--out", out) == 0
    assert Image.open(out).size[0] > 600
    assert ardist("schedule", "--training", "--frames", 8, "--timesteps", 64, "--out", tmp_path / "laws.png") == 0
    assert (tmp_path / "laws.png").exists()
    laws = ["--law", "fopp", "--law", "fopp=0.9,synchronous=0.1", "--out", tmp_path / "mixed.png"]
    assert ardist("schedule", "--training", "--frames", 8, "--timesteps", 64, *laws) == 0
    # Two panels beside each other: narrower than the four of all laws.
    assert Image.open(tmp_path / "mixed.png").size[0] < 0.7 * Image.open(tmp_path / "laws.png").size[0]
    assert ardist("schedule", "--law", "fopp", "--out", tmp_path / "x.png") == 2
    assert ardist("schedule", "--training", "--window-kind", "rolling", "--out", tmp_path / "x.png") == 2
    assert "--window-kind rolling has no meaning with --training" in capsys.readouterr().err
    assert ardist("schedule", "--training", "--law", "fopp=a", "--out", tmp_path / "x.png") == 2
    assert "legal: name=weight" in capsys.readouterr().err
    line = ["schedule", "--frames", 40, "--difference", 2, "--window", 16, "--window-kind", "recompute"]
    assert ardist(*line, "--out", tmp_path / "x.png") == 2
    assert "4" in capsys.readouterr().err  # the smallest legal difference
    assert not (tmp_path / "x.png").exists()
    assert ardist("schedule", "--out", tmp_path / "x.jpg") == 2
    assert "legal: a name that ends in .png" in capsys.readouterr().err
    assert not (tmp_path / "x.jpg").exists()


def test_a_bundle_without_ar_vae_and_a_directory_as_target_are_refused_first(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = make_bundle(tmp_path / "blind", None)
    assert ardist("sample", "--bundle", blind, "--out", tmp_path / "x.mp4") == 3
    assert "no AR-VAE" in capsys.readouterr().err
    (tmp_path / "y.mp4").mkdir()
    assert ardist("sample", "--bundle", bundle, "--out", tmp_path / "y.mp4") == 2
    assert "is a directory" in capsys.readouterr().err


def test_only_a_bundle_is_replaced(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    assert is_bundle(copy)
    (copy / "thesis.tex").touch()
    assert not is_bundle(copy)
    (tmp_path / "config.json").write_text("{}")
    assert not is_bundle(tmp_path)
