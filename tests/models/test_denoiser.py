"""The denoiser: variants, conditions, initialisation, size, refusals."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from denoiser_cases import inputs, random_denoiser
from torch.utils.flop_counter import FlopCounterMode

from ardist.config import DenoiserConfig
from ardist.errors import ConfigError, InvalidValueError
from ardist.models.denoiser import Denoiser, check_shapes, model, preset
from ardist.models.flops import denoiser_flops
from ardist.models.positions import axial_rotation, rotate

CONTEXT: dict[str, Any] = {"context_tokens": 5, "context_dim": 6}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Past the type annotations, which these tests check at run time and the product does not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def parameters_of(config: DenoiserConfig) -> tuple[int, int]:
    """(parameters, elements of the state with its fixed tables)"""
    with torch.device("meta"):
        denoiser = Denoiser(config)
    return sum(p.numel() for p in denoiser.parameters()), sum(v.numel() for v in denoiser.state_dict().values())


def test_released_xl_has_the_published_size() -> None:
    parameters, state = parameters_of(preset("released-xl"))
    assert abs(state / 672.5e6 - 1) < 1e-3
    assert parameters == state - 16 * 32 * 1152


@pytest.mark.parametrize("positions", ["rope", "rope_1d", "sincos"])
@pytest.mark.parametrize("mask", ["strict", "released", "bidirectional"])
@pytest.mark.parametrize("residual", ["prenorm", "released"])
def test_every_variant_runs_for_any_number_of_frames(positions: str, mask: str, residual: str) -> None:
    denoiser = random_denoiser(positions=positions, mask=mask, residual=residual, num_classes=3, **CONTEXT)
    for frames in (1, 2, 7):
        arguments = inputs(denoiser.config, frames=frames)
        out = denoiser(**arguments)
        assert out.shape == arguments["latents"].shape
        assert out.isfinite().all()
        out.sum().backward()
    unused = [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == ["context.null"], "every weight but the null context takes part"


def test_fresh_denoiser_predicts_zero_and_learns_from_there() -> None:
    denoiser = Denoiser(preset("tiny", depth=2))
    arguments = inputs(denoiser.config)
    out = denoiser(**arguments)
    assert not out.any()
    (out - 1).square().mean().backward()
    assert denoiser.output.weight.grad is not None
    assert denoiser.output.weight.grad.any()


def test_each_frame_has_its_own_timestep() -> None:
    denoiser = random_denoiser()
    arguments = inputs(denoiser.config)
    before = denoiser(**arguments)
    arguments["timesteps"][:, 3] -= 1
    difference = (denoiser(**arguments) - before).abs().amax(dim=(0, 2, 3))
    assert difference[:3].max() == 0
    assert difference[3:].min() > 0


def test_null_class_is_of_its_own_and_stands_for_no_class() -> None:
    denoiser = random_denoiser(num_classes=3)
    arguments = inputs(denoiser.config)
    results = {}
    for class_id in range(4):
        arguments["class_ids"] = torch.full((2,), class_id)
        results[class_id] = denoiser(**arguments)
    arguments.pop("class_ids")
    torch.testing.assert_close(denoiser(**arguments), results[3], rtol=0, atol=0)
    for class_id in range(3):
        assert (results[3] - results[class_id]).abs().max() > 1e-3


def test_dropped_context_is_the_learned_null_context_per_clip() -> None:
    denoiser = random_denoiser(**CONTEXT)
    arguments = inputs(denoiser.config)
    kept = denoiser(**arguments)
    mixed = denoiser(**arguments, context_dropped=torch.tensor([False, True]))
    arguments.pop("context")
    null = denoiser(**arguments)
    torch.testing.assert_close(mixed, torch.stack([kept[0], null[1]]), rtol=0, atol=1e-6)
    assert (kept[1] - null[1]).abs().max() > 1e-3
    assert denoiser.context is not None
    with torch.no_grad():
        denoiser.context.null.add_(1)
    assert (denoiser(**arguments) - null).abs().max() > 1e-3


def test_rope_depends_on_differences_only() -> None:
    """Frames 3.. of a long table behave like frames 0.. of a short one, also towards the context."""
    context, length, head_dim = 2, 3, 16
    q, k = torch.randn(2, 1, context + 4 * length, 1, head_dim, generator=torch.Generator().manual_seed(0))
    scores = []
    for first in (0, 3, 100):
        table = axial_rotation((first, first + 4), length, context, head_dim, 100.0)
        turned = rotate(torch.stack([q, k], dim=2), table)
        # Rows: what video tokens ask. (The strict mask lets context tokens ask for context only.)
        scores.append(turned[0, context:, 0, 0] @ turned[0, :, 1, 0].T)
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[2], scores[0], rtol=0, atol=1e-4)
    plain = q[0, :, 0] @ k[0, :, 0].T
    assert (scores[0] - plain[context:])[:, context:].abs().max() > 0.1


def test_window_of_the_call_is_the_window_of_the_configuration() -> None:
    banded, full = random_denoiser(window=2), random_denoiser()
    full.load_state_dict(banded.state_dict())
    arguments = inputs(banded.config)
    torch.testing.assert_close(full(**arguments, window=2), banded(**arguments), rtol=0, atol=0)
    assert (full(**arguments) - banded(**arguments)).abs().max() > 1e-4


def test_half_precision_stays_close() -> None:
    denoiser = random_denoiser(num_classes=3, **CONTEXT)
    arguments = inputs(denoiser.config)
    exact = denoiser(**arguments)
    rounded = denoiser.to(torch.bfloat16)(**arguments)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03


def test_flops_agree_with_a_counter_of_matrix_products() -> None:
    config = DenoiserConfig(
        width=32, depth=2, num_heads=2, tokens_per_frame=3, mask="bidirectional", attention_backend="reference"
    )
    denoiser = random_denoiser(**config.model_dump())
    arguments = inputs(config, batch=1)
    with FlopCounterMode(display=False) as counter:
        out = denoiser(**arguments)
    expected = denoiser_flops(config, 5)
    assert counter.get_total_flops() == expected.forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == expected.backward


def test_flops_of_the_reference_shape() -> None:
    flops = denoiser_flops(preset("xl", context_tokens=77, context_dim=768), 16)
    assert abs(flops.training / 1.67e12 - 1) < 0.005
    assert abs(flops.forward_attention / flops.forward - 0.04) < 0.005


def test_released_mask_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model._warn_of_released_mask.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            random_denoiser(mask="released", **CONTEXT)
    assert caplog.text.count("denoiser.released_mask") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 5, 4, 4)}, r"\(2, 5, 4, 4\).*legal: \(batch, frames >= 1, 3, 4\)"),
        ({"timesteps": torch.zeros(2, 4, dtype=torch.int64)}, r"\(2, 4\).*legal: one integer per frame, \(2, 5\)"),
        ({"context": torch.zeros(2, 4, 6)}, r"context.*\(2, 4, 6\).*legal: \(2, 5, 6\)"),
        ({"class_ids": torch.zeros(3, dtype=torch.int64)}, r"class_ids.*\(3,\).*legal: shape \(2,\)"),
    ],
)
def test_wrong_shapes_are_refused_with_the_legal_ones(change: dict[str, Any], message: str) -> None:
    denoiser = random_denoiser(num_classes=3, **CONTEXT)
    arguments = {"context": None, "class_ids": None} | inputs(denoiser.config) | change
    with pytest.raises(InvalidValueError, match=message):
        check_shapes(denoiser.config, **arguments)


def test_conditions_of_an_unconditional_denoiser_are_refused() -> None:
    denoiser = random_denoiser()
    with pytest.raises(InvalidValueError, match="no classes"):
        denoiser(**inputs(denoiser.config), class_ids=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InvalidValueError, match="legal: None"):
        denoiser(**inputs(denoiser.config), context=torch.zeros(2, 5, 6))


def test_sincos_table_bounds_the_frames() -> None:
    denoiser = random_denoiser(positions="sincos", max_frames=4)
    with pytest.raises(InvalidValueError, match="max_frames=4"):
        denoiser(**inputs(denoiser.config, frames=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": torch.full((2, 5), 1000)}, "timestep 1000 is illegal; legal: 0 to 999"),
        ({"timesteps": torch.full((2, 5), -1)}, "timestep -1 is illegal; legal: 0 to 999"),
        ({"class_ids": torch.tensor([0, 5])}, "class id 5 is illegal; legal: 0 to 2, and 3 for no class"),
        ({"class_ids": torch.tensor([-1, 0])}, "class id -1"),
        ({"window": 4}, "window=4 is illegal; legal: 1 to 3, as configured"),
        ({"window": 0}, "window=0 is illegal; legal: 1 to 3"),
        ({"law": "fop"}, "did you mean 'fopp'"),
    ],
)
def test_every_call_refuses_what_is_out_of_range(change: dict[str, Any], message: str) -> None:
    denoiser = random_denoiser(num_classes=3, window=3, **CONTEXT)
    arguments = inputs(denoiser.config)
    denoiser(**arguments)
    with pytest.raises(InvalidValueError, match=message):
        denoiser(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_ids": torch.zeros(2)}, "class_ids of .*float32 are illegal; legal: .* integers"),
        ({"timesteps": torch.zeros(2, 5, dtype=torch.bool)}, "timesteps of .*bool are illegal; legal: one integer"),
        ({"timesteps": torch.zeros(2, 5)}, "timesteps of .*float32 are illegal; legal: one integer"),
        ({"latents": torch.zeros(2, 5, 3, 4, dtype=torch.int64)}, "latents of type .*int64 .* legal: a floating"),
        ({"context": torch.zeros(2, 5, 6, dtype=torch.int64)}, "context of .*int64 .* legal: .* floating"),
        ({"context_dropped": torch.zeros(2)}, "context_dropped of .*float32 .* legal: .* bool"),
        ({"context_dropped": torch.tensor([True])}, r"context_dropped of shape \(1,\).*legal: shape \(2,\), bool"),
        ({"window": 0.5}, r"window=0\.5 is illegal; legal: an integer"),
        ({"window": 2.5}, r"window=2\.5 is illegal; legal: an integer"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_types_are_refused(change: dict[str, Any], message: str) -> None:
    denoiser = random_denoiser(num_classes=3, **CONTEXT)
    arguments: dict[str, Any] = inputs(denoiser.config) | change
    with pytest.raises(InvalidValueError, match=message):
        denoiser(**arguments)


def test_conditions_that_the_denoiser_does_not_have_are_refused() -> None:
    denoiser = random_denoiser()
    with pytest.raises(InvalidValueError, match="context_dropped .* legal: None, this denoiser has no context"):
        denoiser(**inputs(denoiser.config), context_dropped=torch.tensor([True, False]))
    banded = random_denoiser(mask="bidirectional")
    with pytest.raises(InvalidValueError, match="window=2 is illegal with mask 'bidirectional'; legal: None"):
        banded(**inputs(banded.config), window=2)


def test_timesteps_out_of_order_are_refused_where_the_law_forbids_them() -> None:
    denoiser = random_denoiser()
    arguments = inputs(denoiser.config)
    arguments["timesteps"] = torch.tensor([[1, 1, 9, 9, 10], [3, 7, 5, 6, 8]])
    for law in (None, "independent"):
        denoiser(**arguments, law=law)
    with pytest.raises(InvalidValueError, match=r"timestep 5 of frame 2 of clip 1 is below 7 .*legal: 7 to 999"):
        denoiser(**arguments, law="fopp")


def test_timesteps_are_bounded_by_the_configured_number() -> None:
    denoiser = random_denoiser(num_timesteps=50)
    arguments = inputs(denoiser.config)
    arguments["timesteps"] = torch.full((2, 5), 49)
    denoiser(**arguments)
    with pytest.raises(InvalidValueError, match="timestep 50 is illegal; legal: 0 to 49"):
        denoiser(**arguments | {"timesteps": arguments["timesteps"] + 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "not a multiple"),
        ({"width": 36, "num_heads": 4}, "even and at least 8"),
        ({"mask": "bidirectional", "window": 4}, "bidirectional"),
        ({"mask": "causal"}, "strict"),
        ({"context_tokens": 3}, "together"),
        ({"depht": 3}, "did you mean 'depth'"),
    ],
)
def test_illegal_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset("tiny", **changes)
    with pytest.raises(ConfigError, match="released-xl"):
        preset("huge")
