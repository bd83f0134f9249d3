"""What is found, and how it is labelled: folders, lists, links, label files."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ardist.errors import ConfigError
from data_tools.labels import Label, read_labels
from data_tools.reasons import Reason, Refusal, quarantine_line
from data_tools.sources import list_sources
from data_tools.timing import clip_starts, measure, seek_time


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_a_folder_is_searched_in_order_and_links_end(tmp_path: Path) -> None:
    _touch(tmp_path, "b.mp4", "a/z.MKV", "a/notes.txt", "a.mp4", ".hidden/x.mp4", "noext", "clip.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "linked.mp4").symlink_to(tmp_path / "b.mp4")
    root, listed = list_sources(str(tmp_path))
    assert root.address == str(tmp_path)
    assert [item.name for item in listed] == ["a.mp4", "a/z.MKV", "b.mp4", "linked.mp4", "noext"]


def test_an_output_inside_the_videos_is_not_searched(tmp_path: Path) -> None:
    _touch(tmp_path, "a.mp4", "out/shards/x.mp4")
    assert [item.name for item in list_sources(str(tmp_path), exclude=str(tmp_path / "out"))[1]] == ["a.mp4"]


def test_a_single_file_and_a_list(tmp_path: Path) -> None:
    _touch(tmp_path, "v/a.mp4", "v/b.weird")
    assert [item.name for item in list_sources(str(tmp_path / "v" / "b.weird"))[1]] == ["b.weird"]
    (tmp_path / "list.txt").write_text(f"# comment\nv/b.weird\n{tmp_path}/v/a.mp4\n\nv/none.mp4\nv/a.mp4\n")
    _, listed = list_sources(str(tmp_path / "list.txt"))
    assert [(item.name, item.refused) for item in listed] == [
        ("v/a.mp4", None),
        ("v/b.weird", None),
        ("v/none.mp4", Reason.VANISHED),
    ]


def test_names_in_a_list_end_at_newlines_only(tmp_path: Path) -> None:
    names = ["line\u2028separator.mp4", "next\x85line.mp4", "form\x0cfeed.mp4", "carriage\rreturn.mp4"]
    _touch(tmp_path, *names)
    (tmp_path / "list.txt").write_bytes("\r\n".join(["# all", *names, ""]).encode())
    _, listed = list_sources(str(tmp_path / "list.txt"))
    assert [(item.name, item.refused) for item in listed] == [(name, None) for name in sorted(names)]


def test_odd_entries_are_listed_with_a_reason(tmp_path: Path) -> None:
    _touch(tmp_path, "good.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    found = {item.name: item.refused for item in list_sources(str(tmp_path))[1]}
    assert found == {
        "good.mp4": None,
        "empty.mp4": Reason.EMPTY,
        "folder.mp4": Reason.NOT_A_FILE,
        "pipe.mp4": Reason.NOT_A_FILE,
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "path,label\na.mp4,cat\nsub/b.mp4,dog\n"),
        ("l.csv", "\ufeffVideo,Class\n./a.mp4,cat\nsub/b.mp4,dog\n"),
        ("l.tsv", "file\tlabel\na.mp4\tcat\nsub/b.mp4\tdog\n"),
        ("l.jsonl", '{"path":"a.mp4","label":"cat"}\n\n{"video":"sub/b.mp4","class":"dog"}\n'),
    ],
)
def test_label_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    labels = read_labels(str(tmp_path / name))
    assert labels.of("a.mp4") == Label("cat")
    assert labels.of("sub/b.mp4") == Label("dog")
    with pytest.raises(Refusal) as caught:
        labels.of("c.mp4")
    assert caught.value.reason is Reason.LABEL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 2: needs a path"),
        ("path,label\na.mp4,\n", "line 2: needs a path"),
        ("path,label\na.mp4,x\na.mp4,y\n", "line 3: another line gives 'a.mp4' another label"),
        ("path,label\n", "holds no labels"),
    ],
)
def test_label_files_that_cannot_be_right(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_labels(str(tmp_path / "l.csv"))


def test_captions_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"path,caption\na.mp4," + b"x" * 9000 + b"\nb.mp4,bad \xff byte\nc.mp4,   \n")
    labels = read_labels(str(tmp_path / "l.csv"))
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        with pytest.raises(Refusal) as caught:
            labels.of(name)
        assert caught.value.reason is Reason.CAPTION


def test_words_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    """JSON can name half a surrogate pair, which no later reader could take."""
    (tmp_path / "l.jsonl").write_text(
        '{"path":"a.mp4","caption":"cut \\ud83d"}\n{"path":"b.mp4","label":"\\udc80"}\n'
        '{"path":"c.mp4","label":"\\ud83d\\ude00"}\n'
    )
    labels = read_labels(str(tmp_path / "l.jsonl"))
    for name, reason in (("a.mp4", Reason.CAPTION), ("b.mp4", Reason.LABEL)):
        with pytest.raises(Refusal) as caught:
            labels.of(name)
        assert caught.value.reason is reason
        assert json.loads(quarantine_line(caught.value.record(name, "plan")))["reason"] == reason
    assert labels.of("c.mp4") == Label("\U0001f600")


def test_lines_of_labels_end_at_newlines_only(tmp_path: Path) -> None:
    text = '{"path":"a\u2028.mp4","caption":"one\u2028two\x85three"}\r\n{"path":"b.mp4","label":"x"}\r\n'
    (tmp_path / "l.jsonl").write_bytes(text.encode())
    labels = read_labels(str(tmp_path / "l.jsonl"))
    assert labels.of("a\u2028.mp4") == Label(None, "one\u2028two\x85three")
    assert labels.of("b.mp4") == Label("x")


# ---- frame times ----------------------------------------------------------------------------------------------------

TICK = Fraction(1, 1000)


def test_the_stated_rate_is_believed_only_where_the_times_agree() -> None:
    times = [round(1000 * n / 25) for n in range(100)]
    assert measure(times, TICK, [Fraction(25)]).rate == 25
    assert measure(times, TICK, [Fraction(1000), None, Fraction(50)]).rate == 25
    assert measure(times, TICK, [Fraction(0)]).rate == 25
    film = [round(1000 * n * 1001 / 24000) for n in range(100)]
    assert measure(film, TICK, [Fraction(24000, 1001)]).rate == Fraction(24000, 1001)
    assert measure(film, TICK, [Fraction(24)]).rate == 24  # within two percent: the container's word counts
    odd = [round(1000 * n / 7.3) for n in range(100)]
    assert abs(measure(odd, TICK, []).rate - Fraction(73, 10)) < Fraction(1, 50)


def test_pauses_and_lost_frames_leave_the_rate_as_it_is() -> None:
    for rate in (Fraction(12), Fraction(25), Fraction(30000, 1001), Fraction(60), Fraction(120)):
        times = [round(1000 * n / rate) for n in range(200)]
        lost = times[:60] + times[75:100] + times[103:]
        paused = times[:50] + [time + 2500 for time in times[50:]]
        for each in (times, lost, paused):
            assert measure(each, TICK, [rate]).rate == rate
            assert measure(each, TICK, []).rate == measure(times, TICK, []).rate
    # Where no interval prevails there is no such rate: film that is shown as video, two and three fields in turn.
    film = [n * 1000 // 24 for n in range(100)]
    shown = [round(1000 * (time * 60 // 1000) / 60) for time in film]
    assert measure(shown, TICK, []).rate == 24


def test_unknown_and_impossible_times() -> None:
    line = measure([None] * 30, TICK, [Fraction(30)])
    assert line.by_index
    assert line.grid_length(None) == 30
    assert line.grid_length(Fraction(15)) == 15 + 1 - 1
    with pytest.raises(Refusal, match="without times"):
        measure([None] * 30, TICK, [Fraction(1000)])
    with pytest.raises(Refusal, match="no frame rate"):
        measure(list(range(1000)), Fraction(1, 1_000_000), [])
    with pytest.raises(Refusal, match="no packets"):
        measure([], TICK, [])
    assert measure([500], TICK, []).grid_length(None) == 1


@given(
    length=st.integers(0, 300),
    num_frames=st.integers(1, 40),
    stride=st.integers(1, 50),
    cut=st.floats(0, 1, allow_nan=False),
    most=st.one_of(st.none(), st.integers(1, 12)),
)
def test_clips_lie_in_their_portion(length: int, num_frames: int, stride: int, cut: float, most: int | None) -> None:
    front = clip_starts(length, num_frames, stride, (0, cut), most)
    back = clip_starts(length, num_frames, stride, (cut, 1), most)
    assert all(start + num_frames <= length for start in front + back)
    if front and back:
        assert front[-1] + num_frames <= back[0]
    for starts in (front, back):
        assert starts == sorted(set(starts))
        assert most is None or len(starts) <= most
    whole = clip_starts(length, num_frames, stride, (0, 1), None)
    assert len(whole) == max(0, (length - num_frames) // stride + 1)


def test_seek_times() -> None:
    keys = [Fraction(0), Fraction(2), Fraction(4)]
    assert seek_time(keys, Fraction(1)) is None
    assert seek_time(keys, Fraction(2)) == 2
    assert seek_time(keys, Fraction(39, 10)) == 2
    assert seek_time(keys, Fraction(100)) == 4
    assert seek_time([], Fraction(5)) is None
