"""Several frame counts and sizes side by side, and several devices: each group a dataset, each worker a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dt_builds import build_small, samples

from ardist.data.manifest import load_manifest
from ardist.errors import ConfigError, DataError, HardwareError
from data_tools.cli import main
from data_tools.encode import EncoderChoice
from data_tools.groups import Group, check_place, datasets_at, parse_groups


def test_groups_are_read() -> None:
    assert parse_groups(["16x256", "1x512x30"], 8) == [Group(16, 256, 8), Group(1, 512, 30)]
    for bad in ("16", "16x", "x256", "0x256", "16x256x0", "16x256x8x2", "16 x 256", "../x1"):
        with pytest.raises(ConfigError, match="is not of the form FRAMESxSIZE"):
            parse_groups([bad], 8)
    with pytest.raises(ConfigError, match="16x256 is given twice"):
        parse_groups(["16x256", "16x256x4"], 8)


def test_groups_side_by_side(three_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["build", "--videos", str(three_videos), "--out", str(out), "--stride", "4"]
    assert main([*words, "--group", "4x16", "--group", "1x24x6"]) == 0
    assert load_manifest(out / "4x16").shape == (4, 16, 16, 3)
    assert load_manifest(out / "1x24").shape == (1, 24, 24, 3)
    assert len(samples(out / "4x16")) == 9
    assert {info["start_frame"] for _, info in samples(out / "1x24").values()} == {0, 6}
    plain = build_small(three_videos, tmp_path / "plain", samples_per_shard=None)
    assert load_manifest(out / "4x16").digest() == plain.manifest.digest(), "a group is the dataset it would be alone"
    capsys.readouterr()
    # The same again is found finished, another group joins them.
    assert main([*words, "--group", "4x16", "--group", "2x16"]) == 0
    assert "already finished" in " ".join(capsys.readouterr().err.split())
    assert datasets_at(str(out)) == [f"{out}/{name}" for name in ("1x24", "2x16", "4x16")]
    assert main(["verify", str(out)]) == 0
    assert main(["gc", str(out), "--dry-run"]) == 0
    assert main(["stats", str(out)]) == 0
    assert main(["stats", str(out), "--png", str(tmp_path / "x.png")]) == 2
    for name in ("1x24", "4x16"):
        assert main(["inspect", str(out), next(iter(samples(out / name)))]) == 0
    assert main(["inspect", str(out), "0" * 16]) == 3
    assert main(["export-wids", str(out)]) == 0
    assert (out / "2x16" / "wids.json").is_file()
    assert main(["export-wids", str(out), "--out", str(tmp_path / "w.json")]) == 2
    next((out / "2x16" / "shards").glob("*.tar")).write_bytes(b"")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 3
    assert "2x16: " in capsys.readouterr().err


def test_a_dataset_and_groups_do_not_mix(three_videos: Path, tmp_path: Path) -> None:
    build_small(three_videos, tmp_path / "one")
    with pytest.raises(ConfigError, match="holds a dataset without groups"):
        check_place(str(tmp_path / "one"), [Group(1, 16, 1)])
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "groups.json").write_text(json.dumps(["4x16"]))
    with pytest.raises(ConfigError, match="holds the shard groups 4x16"):
        check_place(str(tmp_path / "many"), [])
    for damage in ("", "{}", '["../elsewhere"]', "[3]"):
        (tmp_path / "many" / "groups.json").write_text(damage)
        with pytest.raises(DataError, match=r"groups\.json is damaged"):
            datasets_at(str(tmp_path / "many"))


def test_workers_take_the_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(device: str, workers: int = 4) -> list[str]:
        choice = EncoderChoice("bundle", device)
        return [choice.for_worker(number).device for number in range(workers)]

    assert names("cpu,cpu") == ["cpu"] * 4
    assert names("auto", 1) == ["cuda:0"] if torch.cuda.is_available() else ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert names("auto") == names("cuda") == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert names("cuda:2,cuda:0") == ["cuda:2", "cuda:0", "cuda:2", "cuda:0"]
    assert names("cuda:1,cpu", 2) == ["cuda:1", "cpu"]
    with pytest.raises(HardwareError, match=r"this machine has cuda:0, cuda:1, cuda:2; legal here: cpu, cuda:0"):
        names("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError, match="has no CUDA device; legal here: cpu"):
        names("cuda")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu,", "", "cuda:0 cuda:1"])
def test_what_is_no_device(device: str) -> None:
    for name in ("pixels", "bundle"):
        with pytest.raises(ConfigError, match="is not a device; legal: auto, cpu, cuda"):
            EncoderChoice(name, device).make()
