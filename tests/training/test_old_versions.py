"""What an earlier release wrote is read by this one: its files are kept as they were."""

from __future__ import annotations

from pathlib import Path

from ardist.config import DenoiserConfig, TrainConfig, check, load_config
from ardist.config.migration import VERSION, migrate
from ardist.training.commit import read_commit
from ardist.training.preflight import identity_problems

VERSION_1 = Path(__file__).parent / "fixtures" / "version-1"


def test_a_configuration_of_version_1_is_read() -> None:
    config = load_config(TrainConfig, VERSION_1 / "config.resolved.yaml")
    assert config.version == VERSION
    assert config.denoiser is not None
    assert (config.denoiser.width, config.training.global_batch_size, config.data.lanes) == (32, 8, 4)
    assert config.training.ema_decays == (0.9, 0.99999991)


def test_a_commit_of_version_1_is_read_and_belongs_to_its_configuration() -> None:
    commit = read_commit(VERSION_1 / "step-00000003")
    assert (commit.step, commit.state["data"], commit.folder) == (3, {"consumed": 24}, None)
    assert commit.kind_of_ema(0.99999991) == "ema_1", "as long decays were named once"
    saved = migrate(commit.config, "the commit")
    assert check(DenoiserConfig, saved["denoiser"], "the commit").width == 32
    assert list(identity_problems(commit, load_config(TrainConfig, VERSION_1 / "config.resolved.yaml"))) == []
