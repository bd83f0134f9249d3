"""What is a gradient spike: k deviations above the mean of a full window of good steps."""

from __future__ import annotations

import pytest
import torch

from ardist.training.spikes import SpikeDetector, SpikeDetectors

CPU = torch.device("cpu")


def judged(detector: SpikeDetector, norms: list[float]) -> list[bool]:
    return [bool(detector.judge(norm)) for norm in norms]


def test_nothing_is_judged_before_the_window_is_full() -> None:
    detector = SpikeDetector(3.0, 4, skip=True, device=CPU)
    assert judged(detector, [1.0, 900.0, 1.0]) == [False] * 3
    detector = SpikeDetector(3.0, 4, skip=True, device=CPU)
    assert judged(detector, [1.0, 1.2, 0.8, 1.0, 9.0]) == [False] * 4 + [True]


def test_the_limit_is_mean_plus_sigmas_deviations() -> None:
    norms = [1.0, 2.0, 3.0, 4.0]
    limit = 2.5 + 3.0 * torch.tensor(norms).double().std().item()
    for norm, spike in ((limit - 1e-6, False), (limit + 1e-6, True)):
        detector = SpikeDetector(3.0, 4, skip=True, device=CPU)
        assert judged(detector, [*norms, norm])[-1] is spike


def test_norms_that_never_vary_leave_room() -> None:
    for norm, spike in ((1.19, False), (1.21, True)):
        detector = SpikeDetector(4.0, 4, skip=True, device=CPU)
        assert judged(detector, [1.0] * 4 + [norm])[-1] is spike


@pytest.mark.parametrize(("skip", "again"), [(True, True), (False, False)])
def test_a_skipped_spike_is_no_part_of_the_past_and_a_counted_one_is(skip: bool, again: bool) -> None:
    detector = SpikeDetector(1.4, 4, skip=skip, device=CPU)
    assert judged(detector, [1.0, 1.0, 1.0, 1.0, 100.0]) == [False] * 4 + [True]
    assert judged(detector, [60.0]) == [again]


def test_what_is_not_finite_is_another_matter_and_leaves_no_trace() -> None:
    detector = SpikeDetector(3.0, 3, skip=True, device=CPU)
    assert judged(detector, [1.0, float("inf"), 1.1, float("nan"), 0.9]) == [False] * 5
    assert detector.state() == [1.0, 1.1, 0.9]
    assert judged(detector, [float("inf"), float("nan"), 5.0]) == [False, False, True]


def test_state_continues_and_a_shorter_window_takes_the_newest() -> None:
    detector = SpikeDetector(3.0, 3, skip=True, device=CPU)
    judged(detector, [1.0, 2.0])
    assert detector.state() == [1.0, 2.0]
    judged(detector, [3.0, 4.0])
    assert detector.state() == [2.0, 3.0, 4.0]
    shorter, longer = (SpikeDetector(3.0, size, skip=True, device=CPU) for size in (2, 5))
    for other in (shorter, longer):
        other.load_state(detector.state())
    assert shorter.state() == [3.0, 4.0]
    assert longer.state() == [2.0, 3.0, 4.0]
    assert judged(longer, [1000.0]) == [False], "its window is not full yet"
    assert judged(shorter, [1000.0]) == [True]


def detectors() -> SpikeDetectors:
    return SpikeDetectors(lambda: SpikeDetector(3.0, 3, skip=True, device=CPU))


def by_kind(of: SpikeDetectors, steps: list[tuple[int, float]]) -> list[bool]:
    spikes = []
    for frames, norm in steps:
        of.begin(frames)
        spikes.append(bool(of.judge(norm)))
    return spikes


def test_steps_are_compared_with_those_on_as_many_frames() -> None:
    mixed = [(16, 1.0), (1, 9.0), (16, 1.1), (1, 9.1), (16, 0.9), (1, 8.9), (1, 9.0), (16, 1.0)]
    assert by_kind(detectors(), mixed) == [False] * 8
    assert by_kind(detectors(), [*mixed, (16, 9.0), (1, 90.0)])[-2:] == [True, True]


def test_the_state_is_that_of_every_kind_and_one_window_of_before_serves_all() -> None:
    one, other = detectors(), detectors()
    by_kind(one, [(16, 1.0), (16, 1.1), (16, 0.9), (1, 9.0)])
    assert one.state() == {"1": [9.0], "16": [1.0, 1.1, 0.9]}
    other.load_state(one.state())
    assert other.state() == one.state()
    assert by_kind(other, [(16, 5.0), (1, 50.0)]) == [True, False]
    other.load_state([1.0, 1.1, 0.9])
    assert by_kind(other, [(16, 5.0), (1, 1.0)]) == [True, False]
