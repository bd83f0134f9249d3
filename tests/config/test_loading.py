"""Configuration: what is refused, in which words, and that what is accepted survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ardist.config import TrainConfig, apply_override, batch_layout, dump_config, load_config, migration
from ardist.errors import ConfigError

GOOD = """
task: denoiser
run_dir: runs/x
denoiser: {preset: tiny, width: 96}
data: {path: data/x}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, write(tmp_path, text), overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, write(tmp_path, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_preset_fills_what_is_not_given(tmp_path: Path) -> None:
    config = load_config(TrainConfig, write(tmp_path, GOOD))
    assert config.denoiser is not None
    assert (config.denoiser.width, config.denoiser.depth) == (96, 4)


def test_round_trip_through_yaml_keeps_every_value(tmp_path: Path) -> None:
    config = load_config(TrainConfig, write(tmp_path, GOOD), ["diffusion.law={fopp: 0.9, synchronous: 0.1}"])
    dump_config(config, tmp_path / "resolved.yaml")
    again = load_config(TrainConfig, tmp_path / "resolved.yaml")
    assert again == config
    assert again.digest() == config.digest()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("traning.steps=3", ["traning", "did you mean 'training'"]),
        ("training.step=3", ["training.step", "did you mean 'steps'"]),
        ("denoiser.widht=3", ["denoiser.widht", "did you mean 'width'", "depth"]),
        ("training.steps=many", ["training.steps", "integer", "many"]),
        ("training.zero_stage=7", ["training.zero_stage", "0, 1, 2 or 3", "7"]),
        ("denoiser.preset=huge", ["huge", "tiny", "xl"]),
        ("data.lanes=7", ["data.lanes=7", "48", "legal lanes", "16"]),
        ("diffusion.law=foppp", ["diffusion.law", "fopp"]),
        ("diffusion.num_timesteps=2000", ["num_timesteps=2000", "denoiser.num_timesteps=1000"]),
        ("diffusion.law={fopp: -1}", ["negative"]),
        ("task=ar_vae", ["needs a section 'ar_vae'"]),
        ("denoiser.num_heads=5", ["width 96", "num_heads 5"]),
        ("optimizer.lr=0", ["optimizer.lr", "greater than 0"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "finite"]),
        ("optimizer.weight_decay=.nan", ["optimizer.weight_decay", "finite"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas", "less than 1"]),
        ("optimizer.betas=[-0.1, 0.9]", ["optimizer.betas", "greater than or equal to 0"]),
        ("init_weights=1.5", ["init_weights", "legal: auto, raw, or an EMA decay"]),
        ("init_weights=ema", ["init_weights", "legal: auto, raw, or an EMA decay"]),
        ("training.ema_decays=[0.9, 0.99, 0.9]", ["ema_decays", "twice"]),
    ],
)
def test_refusals_name_the_place_and_the_legal_values(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refused(tmp_path, GOOD, override)
    assert "run.yaml" in message
    for word in words:
        assert word in message


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD, "training.steps=0", "traning.x=1", "optimizer.lr=fast")
    assert "3 problems" in message


def test_contradictions_are_told_with_what_is_wrong_by_itself(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=fast", "data.lanes=7", "training.offload=parameters", "optimizer.schedule=wsd"]
    message = refused(tmp_path, GOOD, *overrides, "samples.every=5")
    assert "5 problems" in message, message
    for text in ("optimizer.lr: ", "data.lanes=7", "training.offload: parameters", "decay_steps=0", "samples.ar_vae"):
        assert text in message


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.global_batch_size=many", "data.lanes=10"),
        ("training.global_batch_sise=20", "data.lanes=10"),
        ("training.zero_stage=7", "training.offload=optimizer"),
    ],
)
def test_a_default_in_the_place_of_what_was_wrong_is_not_blamed(tmp_path: Path, overrides: tuple[str, str]) -> None:
    assert "1 problem\n" in refused(tmp_path, GOOD, *overrides)


def test_an_older_configuration_is_migrated_and_a_newer_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path, GOOD).version == load(tmp_path, GOOD, "version=1").version == 1
    assert "is of version 9; this release reads versions 1 to 1" in refused(tmp_path, GOOD, "version=9")
    for value in ("0", "true", "one"):
        assert "an integer from 1 to 1" in refused(tmp_path, GOOD, f"version={value}")

    def rename(settings: dict[str, Any]) -> None:
        settings["seed"] = settings.pop("random_seed")

    monkeypatch.setattr(migration, "VERSION", 2)
    monkeypatch.setattr(migration, "MIGRATIONS", {1: rename})
    old = {"task": "denoiser", "random_seed": 3}
    assert migration.migrate(old, "old.yaml") == {"task": "denoiser", "seed": 3, "version": 2}
    assert old == {"task": "denoiser", "random_seed": 3}
    assert migration.migrate({"seed": 4, "version": 2}, "new.yaml") == {"seed": 4, "version": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [unclosed", "not valid YAML"),
        ("- a list", "expected a mapping"),
        ("task: denoiser\ntask: ar_vae\n", "given twice"),
        ("", "required"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, text)


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(TrainConfig, tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(TrainConfig, tmp_path / "binary.yaml")


def test_paths_are_filled_in_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "zu Hause"))
    monkeypatch.setenv("DISK", "/mnt/große platte")
    changes = ["run_dir=~/läufe/a b", "data.path=$DISK/clips", "validation.path=s3://${DISK}/x", "init_from=/a$1/$"]
    config = load(tmp_path, GOOD, *changes)
    assert config.run_dir == f"{tmp_path}/zu Hause/läufe/a b"
    assert config.data.path == "/mnt/große platte/clips"
    assert config.validation.path == "s3:///mnt/große platte/x"
    assert config.init_from == "/a$1/$", "no names of variables"
    message = refused(tmp_path, GOOD, "run_dir=$NO_SUCH_DISK/x")
    assert "run_dir: the environment variable NO_SUCH_DISK is not set" in message


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=1", "run_dir.x=1", "training.steps=["])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert "override" in refused(tmp_path, GOOD, override)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.5", 1.5), (".5", 0.5), ("2e+3", 2000.0)])
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    settings: dict[str, object] = {}
    apply_override(settings, f"optimizer.lr={text}")
    assert settings == {"optimizer": {"lr": value}}


@pytest.mark.parametrize(("given", "kept"), [("0.5", "0.5"), ("0.9999", "0.9999"), ("raw", "raw"), ("'0.5'", "0.5")])
def test_init_weights_takes_a_decay_as_a_number(tmp_path: Path, given: str, kept: str) -> None:
    config = load_config(TrainConfig, write(tmp_path, GOOD), [f"init_weights={given}"])
    assert config.init_weights == kept
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, tmp_path / "resolved.yaml") == config


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 64))
def test_batch_layout_always_covers_the_global_batch(batch: int, micro: int, ranks: int) -> None:
    training = TrainConfig.model_validate(
        {
            "task": "denoiser",
            "run_dir": "x",
            "denoiser": {},
            "data": {"path": "x", "lanes": 1},
            "training": {"global_batch_size": batch, "micro_batch_size": micro},
        }
    ).training
    if batch % ranks:
        with pytest.raises(ValueError, match="legal numbers of ranks"):
            batch_layout(training, ranks)
        return
    size, accumulation = batch_layout(training, ranks)
    assert size * accumulation * ranks == batch
    assert size <= micro
    per_rank = batch // ranks
    assert not any(per_rank % larger == 0 for larger in range(size + 1, min(micro, per_rank) + 1))
