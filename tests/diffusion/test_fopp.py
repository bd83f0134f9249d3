"""The timestep laws against their enumerated probabilities, and their independence of batch and device."""

from __future__ import annotations

import itertools
from collections import Counter
from math import comb, sqrt

import jaxtyping
import pytest
import torch

from ardist.diffusion.counter_rng import Purpose
from ardist.diffusion.fopp import LAWS, check_timesteps, parse_law, sample_timesteps
from ardist.errors import InvalidValueError


def draw(law, count: int, num_frames: int, num_timesteps: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    ids = torch.arange(count)
    return sample_timesteps(law, count, num_frames, num_timesteps, seed=seed, epoch=epoch, sample_ids=ids)


def probability(law: str, t: tuple[int, ...], num_timesteps: int) -> float:
    """The law's probability of the sequence t, by the formulas of the paper."""
    frames, top = len(t), num_timesteps - 1
    if law == "independent":
        return num_timesteps**-frames
    if any(a > b for a, b in itertools.pairwise(t)):
        return 0.0
    if law == "synchronous":
        return 1 / num_timesteps if len(set(t)) == 1 else 0.0
    if law == "uniform_monotone":
        return 1 / comb(num_timesteps + frames - 1, frames)
    paths = (comb(t[f] + f, f) * comb((frames - 1 - f) + (top - t[f]), frames - 1 - f) for f in range(frames))
    return sum(1 / n for n in paths) / (frames * num_timesteps)


def chi_square_p(drawn: torch.Tensor, expected: dict[tuple[int, ...], float]) -> float:
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) <= {t for t, p in expected.items() if p > 0}, "a sequence of probability 0 was drawn"
    total = len(drawn)
    statistic = sum((counts[t] - total * p) ** 2 / (total * p) for t, p in expected.items() if p > 0)
    freedom = sum(p > 0 for p in expected.values()) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))


def all_sequences(num_frames: int, num_timesteps: int):
    return itertools.product(range(num_timesteps), repeat=num_frames)


@pytest.mark.parametrize(("num_frames", "num_timesteps"), [(1, 6), (2, 5), (3, 4), (4, 4), (5, 3), (6, 2)])
@pytest.mark.parametrize("law", LAWS)
def test_law_has_its_enumerated_probabilities(law: str, num_frames: int, num_timesteps: int) -> None:
    expected = {t: probability(law, t, num_timesteps) for t in all_sequences(num_frames, num_timesteps)}
    assert abs(sum(expected.values()) - 1) < 1e-9
    assert chi_square_p(draw(law, 150_000, num_frames, num_timesteps, seed=20), expected) > 0.01


def test_mixture_has_the_weighted_probabilities() -> None:
    weights = {"independent": 3.0, "fopp": 5.0, "synchronous": 1.0, "uniform_monotone": 1.0}
    expected = {t: sum(w / 10 * probability(n, t, 4) for n, w in weights.items()) for t in all_sequences(3, 4)}
    assert chi_square_p(draw(weights, 150_000, 3, 4, seed=20), expected) > 0.01


def test_each_clip_of_a_mixture_follows_one_of_its_laws_exactly() -> None:
    """The choice of the law must not disturb what the law draws, nor depend on the order of the weights."""
    mixed = draw({"synchronous": 0.5, "fopp": 0.3, "independent": 0.2}, 2000, 8, 100)
    assert torch.equal(
        mixed, draw({"independent": 2, "fopp": 3, "synchronous": 5, "uniform_monotone": 0}, 2000, 8, 100)
    )
    pure = torch.stack([draw(law, 2000, 8, 100) for law in ("synchronous", "fopp", "independent")])
    same = (pure == mixed).all(dim=2)
    assert same.any(dim=0).all()
    assert torch.allclose(same.double().mean(dim=1), torch.tensor([0.5, 0.3, 0.2]).double(), atol=0.04)
    assert torch.equal(draw({"fopp": 1}, 50, 8, 100), draw("fopp", 50, 8, 100))


def test_fopp_per_frame_means_of_the_reference_shape() -> None:
    """METHOD: mean timestep / T at F=16, T=1000; and the pooled density is U-shaped."""
    drawn = draw("fopp", 60_000, 16, 1000, seed=4)
    expected = [0.106, 0.182, 0.245, 0.299, 0.349, 0.394, 0.437, 0.479]
    expected += [0.521, 0.563, 0.606, 0.651, 0.701, 0.755, 0.818, 0.894]
    assert (drawn.double().mean(dim=0) / 1000 - torch.tensor(expected)).abs().max() < 0.005
    density = torch.histc(drawn.float(), bins=100, min=0, max=1000) / drawn.numel() * 100
    assert density[[0, -1]].min() > 1.7
    assert 0.65 < density[45:55].mean() < 0.77


@pytest.mark.parametrize("law", ["fopp", "synchronous", "uniform_monotone", {"fopp": 0.9, "synchronous": 0.1}])
@pytest.mark.parametrize(("num_frames", "num_timesteps"), [(1, 1), (16, 1000), (128, 50), (1024, 4000), (4096, 4096)])
def test_rows_are_monotone_and_in_range(law, num_frames: int, num_timesteps: int) -> None:
    drawn = draw(law, 20, num_frames, num_timesteps)
    assert drawn.shape == (20, num_frames)
    assert drawn.dtype == torch.int64
    assert drawn.min() >= 0
    assert drawn.max() < num_timesteps
    assert (drawn.diff(dim=1) >= 0).all()


def test_long_clips_have_the_right_order_statistics() -> None:
    """A sorted r-subset of n has mean k (n+1)/(r+1) in place k: long chains of pointers must not bend it."""
    frames, steps, clips = 1024, 4000, 400
    drawn = draw("uniform_monotone", clips, frames, steps).double()
    place, n = torch.arange(1, frames + 1), steps + frames - 1
    mean = place * (n + 1) / (frames + 1) - place
    deviation = (place * (frames + 1 - place) * (n + 1) * (n - frames) / ((frames + 1) ** 2 * (frames + 2))).sqrt()
    assert ((drawn.mean(dim=0) - mean).abs() < 4.5 * deviation / sqrt(clips) + 1e-9).all()
    ratio = drawn.std(dim=0) / deviation
    assert ((ratio > 0.8) & (ratio < 1.2)).all()


@pytest.mark.parametrize("law", [*LAWS, {"fopp": 1, "independent": 1, "synchronous": 1}])
def test_a_row_depends_only_on_seed_epoch_and_sample(law) -> None:
    ids = torch.tensor([7, -1, 2**50, 12, 99])
    rows = sample_timesteps(law, 5, 9, 300, seed=3, epoch=2, sample_ids=ids)
    order = torch.tensor([4, 2, 0])
    again = sample_timesteps(law, 3, 9, 300, seed=3, epoch=2, sample_ids=ids[order])
    assert torch.equal(again, rows[order])
    for changed in ({"seed": 4}, {"epoch": 3}, {"purpose": Purpose.VALIDATION}):
        keys = {"seed": 3, "epoch": 2, **changed}
        assert not torch.equal(sample_timesteps(law, 5, 9, 300, sample_ids=ids, **keys), rows)


def test_the_draws_are_frozen() -> None:
    """Resumed runs see the timesteps they would have seen: these rows must never change."""
    assert draw("fopp", 2, 6, 1000, seed=5, epoch=1).tolist() == [[5, 7, 7, 10, 17, 18], [82, 458, 747, 918, 942, 970]]
    mixed = draw({"fopp": 1, "independent": 1}, 2, 4, 1000, seed=5, epoch=1)
    assert mixed.tolist() == [[405, 516, 378, 801], [89, 812, 498, 583]]


def test_nothing_is_read_back_to_the_host() -> None:
    """On the meta device there is no data: reading a value raises."""
    ids = torch.empty(3, dtype=torch.int64, device="meta")
    for law in (*LAWS, {"fopp": 1, "independent": 1}):
        drawn = sample_timesteps(law, 3, 16, 1000, seed=0, epoch=0, sample_ids=ids)
        assert drawn.shape == (3, 16)
        assert drawn.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_draws_the_same_rows_without_a_sync() -> None:
    ids = torch.arange(100)
    on_gpu = ids.cuda()
    for law in (*LAWS, {"fopp": 1, "independent": 1}):
        torch.cuda.set_sync_debug_mode("error")
        drawn = sample_timesteps(law, 100, 64, 1000, seed=0, epoch=0, sample_ids=on_gpu)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(drawn.cpu(), sample_timesteps(law, 100, 64, 1000, seed=0, epoch=0, sample_ids=ids))


@pytest.mark.parametrize(
    ("law", "num_frames", "num_timesteps", "match"),
    [
        ("fop", 16, 1000, r"law='fop' is not known \(did you mean 'fopp'\?\); legal: fopp, synchronous"),
        ({"fopp": 1, "syncronous": 1}, 16, 1000, "did you mean 'synchronous'"),
        ({"fopp": -1.0}, 16, 1000, r"weight -1\.0; legal"),
        ({"fopp": float("nan")}, 16, 1000, "weight nan"),
        ({"fopp": 0.0}, 16, 1000, "at least one positive weight"),
        ({}, 16, 1000, "at least one positive weight"),
        ("fopp", 0, 1000, r"num_frames=0 is out of range; legal: 1\.\.4096"),
        ("fopp", 16, 5000, "num_timesteps=5000"),
    ],
)
def test_bad_arguments_name_the_legal_ones(law, num_frames: int, num_timesteps: int, match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        draw(law, 4, num_frames, num_timesteps)


@pytest.mark.parametrize("law", [*LAWS, {"fopp": 0.5, "synchronous": 0.5}, {"fopp": 1, "independent": 1}])
def test_a_law_passes_its_own_check(law) -> None:
    check_timesteps(law, draw(law, 200, 8, 50), 50)


@pytest.mark.parametrize(
    ("law", "rows", "match"),
    [
        ("fopp", [[0, 9], [5, 4]], r"timestep 4 of frame 1 of clip 1 is below 5 .*fopp never gives; legal: 5 to 9"),
        ({"fopp": 1, "uniform_monotone": 2}, [[1, 0]], r"fopp \+ uniform_monotone never gives"),
        ("synchronous", [[3, 4]], "timestep 4 of frame 1 of clip 0 is not 3 .*legal: 3"),
        ({"fopp": 1, "independent": 0}, [[1, 0]], "is below 1"),
        (None, [[0, 10]], "timestep 10 is illegal; legal: 0 to 9"),
        ("independent", [[-1, 0]], "timestep -1 is illegal"),
        ("fop", [[0, 0]], "did you mean 'fopp'"),
    ],
)
def test_timesteps_that_a_law_never_gives_are_refused(law, rows: list[list[int]], match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        check_timesteps(law, torch.tensor(rows), 10)


@pytest.mark.parametrize("law", [None, "independent", {"fopp": 1, "independent": 1}])
def test_any_order_is_fine_where_the_law_has_none(law) -> None:
    check_timesteps(law, torch.tensor([[5, 4, 9]]), 10)


def test_laws_as_written_on_a_command_line() -> None:
    assert parse_law("fopp") == "fopp"
    assert parse_law("fopp=0.9, synchronous=.1") == {"fopp": 0.9, "synchronous": 0.1}
    for text in ("fop", "fop=1", "fopp=x", "fopp=-1", "fopp=inf", "fopp=1,fopp=2", "fopp=0", "fopp=1,", ""):
        with pytest.raises(InvalidValueError, match="legal|at least one positive"):
            parse_law(text)


@pytest.mark.parametrize(("sizes", "match"), [((2.5, 10), r"num_frames=2\.5"), ((4, 10.5), r"num_timesteps=10\.5")])
def test_sizes_that_are_no_integers_are_refused(sizes, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the type annotations, which these tests check at run time and the product does not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidValueError, match=f"{match} is illegal; legal: an integer"):
        draw("fopp", 4, *sizes)


def test_batch_size_must_match_the_sample_ids() -> None:
    with pytest.raises(InvalidValueError, match="batch_size=3"):
        sample_timesteps("fopp", 3, 4, 10, seed=0, epoch=0, sample_ids=torch.arange(4))
