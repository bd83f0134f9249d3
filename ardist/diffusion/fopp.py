"""Laws of the training timesteps: FoPP (frame-oriented probability propagation), its ablations, and mixtures of them.

Source: AR-Diffusion (arXiv 2503.07418), "FoPP timestep scheduler". An anchor frame f and its timestep t_f are uniform;
given them, the timesteps before and after the anchor are uniform over all non-decreasing sequences in [0, t_f] and in
[t_f, T-1]. The paper counts those sequences in two tables and walks through them frame by frame. Here a uniform
non-decreasing sequence comes from an urn instead, without a table, for all clips and frames at once:

    the urn starts with m values; each draw puts its value back twice.

r draws hit every multiset of r values with the same probability, 1 / C(m+r-1, r), and a non-decreasing sequence is a
multiset in order. Draw k is thus uniform over m + k - 1 tokens: either one of the m values, or a pointer to one of the
k - 1 earlier draws. All draws are made at once, the pointers are followed by doubling (log2 F gathers), and one sort
per clip finishes. The probabilities are those of the tables, exactly, for any F and T.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from ardist.diffusion.counter_rng import Purpose, check_sample_ids, random_bits, scale_to_range
from ardist.errors import InvalidValueError, check_integer, choose

LAWS = ("fopp", "synchronous", "independent", "uniform_monotone")
"""fopp; one timestep per clip; one per frame (Diffusion Forcing); uniform over all non-decreasing sequences."""

MAX_FRAMES = MAX_TIMESTEPS = 4096


def sample_timesteps(
    law: str | Mapping[str, float | int],
    batch_size: int,
    num_frames: int,
    num_timesteps: int,
    *,
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, " b"],
    purpose: int = Purpose.TIMESTEPS,
) -> Int64[Tensor, "b f"]:
    """Training timesteps `[batch_size, num_frames]`, each in 0..num_timesteps-1 (0 is the cleanest).

    `law` is one of LAWS, or weights of several laws, from which each clip chooses one. Row b depends on
    (seed, epoch, sample_ids[b], purpose) and the arguments before, on nothing else. On the device of `sample_ids`,
    without a host sync. Raises InvalidValueError for an unknown law, bad weights, sizes outside 1..4096, or sample ids
    that are not int64 `[batch_size]`.
    """
    check_sample_ids(sample_ids)
    weights = _check(law, batch_size, num_frames, num_timesteps, len(sample_ids))
    words = random_bits(seed, epoch, sample_ids, purpose, 2 * (num_frames + 2)).unflatten(1, (num_frames + 2, 2))
    frame = torch.arange(num_frames, device=sample_ids.device)

    # Per frame: draws come from {base, .., base+size-1} or from the earlier draws of frames first, .., frame-1.
    if len(weights) == 1:
        base, size, first = _urns(next(iter(weights)), words, frame, num_timesteps)
    else:
        chosen = _choose_law(weights, seed, epoch, sample_ids)
        urns = [_urns(name, words, frame, num_timesteps) for name in weights]
        base, size, first = (torch.stack(parts, dim=0) for parts in zip(*urns, strict=True))
        rows = torch.arange(batch_size, device=sample_ids.device)
        base, size, first = base[chosen, rows], size[chosen, rows], first[chosen, rows]

    token = scale_to_range(words[:, 2:], size + frame - first)
    fresh = token < size
    source = torch.where(fresh, frame, first + token - size)
    for _ in range((num_frames - 1).bit_length()):
        source = source.gather(1, source)
    timesteps = (base + token).gather(1, source)

    if "independent" not in weights:
        return timesteps.sort(dim=1).values
    if len(weights) == 1:
        return timesteps
    unordered = chosen == list(weights).index("independent")
    return torch.where(unordered.unsqueeze(1), timesteps, timesteps.sort(dim=1).values)


def parse_law(text: str) -> str | dict[str, float]:
    """A law or a mixture as written on a command line: ``fopp``, or ``fopp=0.9,synchronous=0.1``.

    Raises InvalidValueError for an unknown law and for weights that are none.
    """
    if "=" not in text:
        return choose("law", text, LAWS)
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if name in weights or not 0 <= weight < float("inf"):
            raise InvalidValueError(
                f"law={text!r} is illegal at {part!r}; legal: name=weight,name=weight, each name once"
            )
        weights[name] = weight
    _weights(weights)
    return weights


def check_timesteps(
    law: str | Mapping[str, float | int] | None, timesteps: Int[Tensor, "b f"], num_timesteps: int
) -> None:
    """Refuse timesteps that `law` never gives: outside 0..num_timesteps-1, or in an order it forbids.

    ``fopp`` and ``uniform_monotone`` never decrease from one frame to the next, ``synchronous`` is constant over a
    clip; ``independent``, a mixture with it, and None (no law known) forbid no order. Reads the values back to the
    host. Raises InvalidValueError with the first value that is wrong and the legal ones.
    """
    wrong = timesteps[(timesteps < 0) | (timesteps >= num_timesteps)]
    if wrong.numel():
        raise InvalidValueError(f"timestep {int(wrong[0])} is illegal; legal: 0 to {num_timesteps - 1}")
    laws = set() if law is None else set(_weights(law))
    if not laws or "independent" in laws:
        return
    before, after = timesteps[:, :-1], timesteps[:, 1:]
    constant = laws == {"synchronous"}
    falls = ((after != before) if constant else (after < before)).nonzero()
    if falls.numel():
        clip, frame = (int(index) for index in falls[0])
        low, value = int(before[clip, frame]), int(after[clip, frame])
        legal = f"{low}" if constant else f"{low} to {num_timesteps - 1}"
        relation = "is not" if constant else "is below"
        raise InvalidValueError(
            f"timestep {value} of frame {frame + 1} of clip {clip} {relation} {low} of the frame before, "
            f"which {' + '.join(sorted(laws))} never gives; legal: {legal}"
        )


def _urns(law: str, words: Tensor, frame: Tensor, num_timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(base, size, first) `[b, f]` of every frame's urn; a frame with first == frame starts an urn of its own."""
    batch_size, num_frames = len(words), len(frame)
    zero, frame = words.new_zeros(()), frame.expand(batch_size, num_frames)
    if law == "independent":
        parts = (zero, zero + num_timesteps, frame)
    elif law == "uniform_monotone":
        parts = (zero, zero + num_timesteps, zero)
    else:
        level = scale_to_range(words[:, :1], num_timesteps)
        if law == "synchronous":
            parts = (level, zero + 1, frame)
        else:
            anchor = scale_to_range(words[:, 1:2], num_frames)
            before, after = frame < anchor, frame > anchor
            size = torch.where(before, level + 1, torch.where(after, num_timesteps - level, 1))
            first = torch.where(before, 0, torch.where(after, anchor + 1, anchor))
            parts = (torch.where(before, 0, level), size, first)
    base, size, first = (part.expand(batch_size, num_frames) for part in parts)
    return base, size, first


def _choose_law(weights: Mapping[str, float | int], seed: int, epoch: int, sample_ids: Tensor) -> Tensor:
    """Index `[b]` into `weights` of each clip's law."""
    total = sum(weights.values())
    word = random_bits(seed, epoch, sample_ids, Purpose.LAW, 1)[:, 0]
    bounds = [round(share / total * 2**32) for share in itertools.accumulate(weights.values())]
    chosen = torch.zeros_like(word)
    for bound in bounds[:-1]:
        chosen += word >= bound
    return chosen


def _check(
    law: str | Mapping[str, float | int], batch_size: int, num_frames: int, num_timesteps: int, num_ids: int
) -> dict[str, float]:
    """The weights of the laws that can occur, in the order of LAWS."""
    for name, value, bound in (
        ("num_frames", num_frames, MAX_FRAMES),
        ("num_timesteps", num_timesteps, MAX_TIMESTEPS),
    ):
        check_integer(name, value)
        if not 1 <= value <= bound:
            raise InvalidValueError(f"{name}={value} is out of range; legal: 1..{bound}")
    if num_ids != batch_size:
        raise InvalidValueError(f"batch_size={batch_size} needs as many sample_ids, got {num_ids}")
    return _weights(law)


def _weights(law: str | Mapping[str, float | int]) -> dict[str, float]:
    """The positive weights of a law or a mixture, in the order of LAWS."""
    given = {law: 1.0} if isinstance(law, str) else law
    for name, weight in given.items():
        choose("law", name, LAWS)
        if not 0 <= weight < float("inf"):
            raise InvalidValueError(f"law {name!r} has weight {weight}; legal: finite numbers >= 0")
    weights = {name: float(given[name]) for name in LAWS if given.get(name, 0) > 0}
    if not weights:
        raise InvalidValueError("a mixture of laws needs at least one positive weight")
    return weights
