"""Philox against published vectors, the frozen stream layout, independence of the batch, and the distributions."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ardist.diffusion import counter_rng
from ardist.diffusion.counter_rng import (
    Purpose,
    _box_muller,
    bernoulli,
    integers,
    normal,
    philox4x32,
    random_bits,
    scale_to_range,
    uniform,
)
from ardist.diffusion.philox_host import philox4x32_host
from ardist.errors import InvalidValueError

IDS = torch.tensor([0, 1, -1, 2**32, 0x0123456789ABCDEF])
ONES = 2**32 - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers_of_random123(counter, key, expected) -> None:
    words = philox4x32(tuple(torch.tensor(word) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected
    on_host = philox4x32_host(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in on_host[0]) == expected


@pytest.mark.parametrize(("count", "offset"), [(1, 0), (4, 0), (37, 5), (8, 3)])
def test_small_draws_have_the_bits_of_large_ones(count: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small draws on a CPU go through NumPy, all others through tensors."""
    arguments = (0x7EDCBA9876543210, 0xABCDEF, IDS.repeat(3)[::3], 250, count)
    small = random_bits(*arguments, offset=offset)
    used = []
    monkeypatch.setattr(counter_rng, "philox4x32_host", lambda *_: used.append(True))
    monkeypatch.setattr(counter_rng, "HOST_BLOCKS", 0)
    assert torch.equal(random_bits(*arguments, offset=offset), small)
    assert small.dtype == torch.int64
    assert not used


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_the_address_is_laid_out_as_documented() -> None:
    seed, epoch, purpose = 0x7EDCBA9876543210, 0xABCDEF, 250
    bits = random_bits(seed, epoch, IDS, purpose, 10)
    for row, sample_id in enumerate(IDS.tolist()):
        low, high = sample_id % 2**32, (sample_id >> 32) % 2**32
        key = [seed % 2**32, seed >> 32]
        expected = [w for block in range(3) for w in philox_in_python([block, epoch << 8 | purpose, low, high], key)]
        assert bits[row].tolist() == expected[:10]


def test_the_stream_is_frozen() -> None:
    """These numbers must never change: a checkpoint resumes with the noise it was trained with."""
    ids = torch.tensor([5, 2**40 + 7])
    assert random_bits(7, 3, ids, Purpose.NOISE, 5).tolist() == [
        [2471915391, 2415819479, 1859412034, 528947559, 3714741546],
        [1646814310, 3366331208, 4077516077, 3425195258, 2072158637],
    ]
    assert uniform(7, 3, ids, Purpose.FLIP, (2,)).tolist() == [
        [0.3974252939224243, 0.3352906107902527],
        [0.1788419485092163, 0.2110314965248108],
    ]
    assert normal(7, 3, ids, Purpose.NOISE, (3,)).tolist() == [
        [-0.9710707068443298, 0.40239647030830383, 1.2938865423202515],
        [-0.7508249878883362, -1.1633847951889038, -0.15085604786872864],
    ]
    assert integers(7, 3, ids, Purpose.FRAME_CHOICE, (3,), -5, 1000).tolist() == [[221, 208, 783], [620, 619, 568]]
    coins = bernoulli(7, 3, torch.arange(12), Purpose.CONDITION_DROPOUT, 0.5)
    assert coins.int().tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0]
    assert [purpose.value for purpose in Purpose] == list(range(1, len(Purpose) + 1))


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_row_does_not_depend_on_its_batch(draw) -> None:
    ids = torch.arange(100, 137)
    whole = draw(1, 2, ids, Purpose.NOISE, (3, 5))
    assert whole.shape == (37, 3, 5)
    assert torch.equal(draw(1, 2, ids.flip(0), Purpose.NOISE, (3, 5)).flip(0), whole)
    for row in (0, 17, 36):
        assert torch.equal(draw(1, 2, ids[row : row + 1], Purpose.NOISE, (3, 5))[0], whole[row])


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("offset", range(1, 8))
def test_a_part_of_a_stream_can_be_drawn_alone(draw, offset: int) -> None:
    whole = draw(1, 2, IDS, Purpose.SAMPLER_NOISE, (20,))
    assert torch.equal(
        draw(1, 2, IDS, Purpose.SAMPLER_NOISE, (2, 3), offset=offset).flatten(1), whole[:, offset:][:, :6]
    )


def test_distinct_addresses_give_distinct_streams() -> None:
    words = [
        tuple(random_bits(seed, epoch, IDS, purpose, 2)[row].tolist())
        for seed, epoch, purpose, row in itertools.product(
            (0, 1, 2**32, 2**63 - 1), (0, 1, 2**24 - 1), (0, 1, 255), range(5)
        )
    ]
    assert len(set(words)) == len(words) == 4 * 3 * 3 * 5


def test_uniform_range_and_moments() -> None:
    values = uniform(3, 0, torch.arange(500), Purpose.NOISE, (1000,), dtype=torch.float64)
    assert values.min() >= 0
    assert values.max() < 1
    assert torch.equal(values * 2**24, (values * 2**24).round())
    assert torch.equal(values.float(), uniform(3, 0, torch.arange(500), Purpose.NOISE, (1000,)))
    assert abs(values.mean() - 0.5) < 4 / math.sqrt(12 * values.numel())
    assert abs(values.var() - 1 / 12) < 5e-4


def test_normal_is_box_muller_of_its_words() -> None:
    """Against float64 mathematics, also at the extreme words, where a float32 logarithm loses its digits."""
    ids = torch.arange(64)
    words = random_bits(1, 0, ids, Purpose.NOISE, 4000).double()
    radius = (-2 * torch.log((2 * words[:, 0::2] + 1) / 2**33)).sqrt()
    angle = 2 * math.pi * (words[:, 1::2] / 2**32 - 1 / 8)
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    values = normal(1, 0, ids, Purpose.NOISE, (4000,))
    assert (values.double() - expected).abs().max() < 1e-6

    extreme = torch.tensor([[0, 1, 2, 2**31 - 1, 2**31, ONES - 1, ONES]])
    radii = _box_muller(extreme, torch.full_like(extreme, 2**29))[:, 0::2]  # angle 0
    exact = (-2 * torch.log1p((2 * extreme.double() + 1 - 2**33) / 2**33)).sqrt()
    torch.testing.assert_close(radii.double(), exact, rtol=1e-4, atol=0)


def test_normal_distribution() -> None:
    values = normal(11, 5, torch.arange(200), Purpose.NOISE, (5000,)).double().flatten().sort().values
    count = values.numel()
    cdf = torch.special.ndtr(values)
    steps = torch.arange(count, dtype=torch.float64) / count
    distance = torch.maximum((cdf - steps).max(), (steps + 1 / count - cdf).max())
    assert distance * math.sqrt(count) < 1.628, "Kolmogorov-Smirnov, p < 0.01"
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / count)


def test_normals_of_one_sample_and_of_neighbours_are_uncorrelated() -> None:
    values = normal(0, 0, torch.arange(2000), Purpose.NOISE, (16,)).double()
    values = torch.cat((values, normal(1, 0, torch.arange(2000), Purpose.NOISE, (16,)).double()), dim=1)
    correlation = torch.corrcoef(values.T) - torch.eye(32)
    assert correlation.abs().max() < 4.5 / math.sqrt(2000)
    neighbours = torch.corrcoef(torch.stack((values[:-1].flatten(), values[1:].flatten())))[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(values[1:].numel())


def test_integers_are_uniform() -> None:
    values = integers(2, 0, torch.arange(100), Purpose.TIMESTEPS, (700,), -3, 4)
    counts = torch.bincount(values.flatten() + 3, minlength=7)
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 16.8, "chi-square with 6 degrees of freedom, p < 0.01"


def test_scale_to_range_is_exact() -> None:
    words = torch.tensor([[0, 0], [ONES, ONES], [2**31, 0], [2**31 - 1, ONES], [0x55555555, 2**31]])
    for size in (1, 2, 3, 1000, 2**31 - 1):  # 3 x 0x55555555 is all ones: the low word decides
        expected = [(high * 2**32 + low) * size >> 64 for high, low in words.tolist()]
        assert scale_to_range(words, size).tolist() == expected
        assert scale_to_range(words, torch.full((5,), size)).tolist() == expected


def test_bernoulli_frequency_and_ends() -> None:
    ids = torch.arange(40_000)
    drawn = bernoulli(0, 0, ids, Purpose.CONDITION_DROPOUT, 0.1)
    assert drawn.dtype == torch.bool
    assert abs(drawn.double().mean() - 0.1) < 4 * math.sqrt(0.09 / len(ids))
    assert not bernoulli(0, 0, ids, Purpose.CONDITION_DROPOUT, 0.0).any()
    assert bernoulli(0, 0, ids, Purpose.CONDITION_DROPOUT, 1.0).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-1, 0, 1), "seed=-1"),
        ((2**63, 0, 1), "seed="),
        ((0, 2**24, 1), "epoch=16777216"),
        ((0, 0, 256), "purpose=256"),
    ],
)
def test_addresses_outside_the_layout_are_refused(arguments, match: str) -> None:
    seed, epoch, purpose = arguments
    with pytest.raises(InvalidValueError, match=match):
        random_bits(seed, epoch, IDS, purpose, 4)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"legal: torch\.float32"):
        uniform(0, 0, IDS, 1, (2,), dtype=torch.bfloat16)
    with pytest.raises(InvalidValueError, match="low=3, high=3"):
        integers(0, 0, IDS, 1, (2,), 3, 3)
    with pytest.raises(InvalidValueError, match=r"p=1\.5"):
        bernoulli(0, 0, IDS, 1, 1.5)
    with pytest.raises(InvalidValueError, match="offset=-4"):
        random_bits(0, 0, IDS, 1, 4, offset=-4)


WRONG_IDS = """
import torch
from ardist.diffusion.counter_rng import bernoulli, normal, random_bits
from ardist.diffusion.fopp import sample_timesteps
from ardist.errors import InvalidValueError

timesteps = lambda ids: sample_timesteps("fopp", 4, 3, 10, seed=0, epoch=0, sample_ids=ids)
draws = [lambda ids: random_bits(0, 0, ids, 1, 4), lambda ids: random_bits(0, 0, ids, 1, 2**17)]
draws += [lambda ids: normal(0, 0, ids, 1, (2,)), lambda ids: bernoulli(0, 0, ids, 1, 0.5), timesteps]
wrong = [torch.arange(4, dtype=dtype) for dtype in (torch.int32, torch.uint8, torch.float64)]
wrong += [torch.zeros((), dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)]
for draw in draws:
    for ids in wrong:
        try:
            draw(ids)
        except InvalidValueError as error:
            assert str(error).startswith(f"sample_ids of shape {tuple(ids.shape)} and {ids.dtype} are illegal"), error
            assert str(error).endswith("legal: one axis, torch.int64"), error
        else:
            raise AssertionError(f"{ids} passed")
"""


def test_sample_ids_of_another_type_or_shape_are_refused() -> None:
    """In a process of its own: here the annotations would refuse them first."""
    subprocess.run([sys.executable, "-c", WRONG_IDS], check=True, timeout=120)


def test_empty_shapes() -> None:
    assert normal(0, 0, IDS, 1, (0, 4)).shape == (5, 0, 4)
    assert normal(0, 0, IDS[:0], 1, (3, 4)).shape == (0, 3, 4)


COMPILED = """
import torch
from ardist.diffusion.counter_rng import normal, random_bits
ids = torch.tensor([3, -1, 2**40], device={device!r})
def draw(ids):
    return random_bits(5, 6, ids, 1, 70), normal(5, 6, ids, 1, (3, 7))
for one, other in zip(torch.compile(draw, fullgraph=True)(ids), draw(ids)):
    assert torch.equal(one, other), (one, other)
"""


def run_compiled(device: str) -> None:
    """In a process of its own: the run-time shape checks of the tests are no part of the compiled graph."""
    subprocess.run([sys.executable, "-c", COMPILED.format(device=device)], check=True, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_bits_equal_eager_bits() -> None:
    run_compiled("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_bits_equal_cpu_bits() -> None:
    ids = torch.arange(50)
    for draw in (uniform, normal):
        on_gpu = draw(1, 2, ids.cuda(), Purpose.NOISE, (1000,))
        assert torch.equal(on_gpu.cpu(), draw(1, 2, ids, Purpose.NOISE, (1000,)))
    run_compiled("cuda")
