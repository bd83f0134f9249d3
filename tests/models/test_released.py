"""Class tables of the published layout: with a row for no class and without one."""

from __future__ import annotations

import pytest
import torch
from denoiser_cases import SMALL, inputs, random_denoiser

from ardist.config import DenoiserConfig
from ardist.errors import CheckpointError
from ardist.models.released import convert_released_state_dict

TABLE = "y_embedder.embedding_table.weight"


@pytest.mark.parametrize(("rows", "null_row"), [(3, 0), (4, 3)])
def test_classes_keep_their_rows_and_no_class_has_the_published_one(rows: int, null_row: int) -> None:
    """Three classes: of three rows that of class 0 stands for none, of four the last does."""
    denoiser = random_denoiser(num_classes=3)
    table = torch.randn(rows, SMALL["width"], generator=torch.Generator().manual_seed(2))
    converted = convert_released_state_dict({TABLE: table}, denoiser.config)
    denoiser.load_state_dict(denoiser.state_dict() | converted)
    weight = denoiser.state_dict()["classes.weight"]
    assert torch.equal(weight[:3], table[:3])
    assert torch.equal(weight[3], table[null_row])

    arguments = inputs(denoiser.config) | {"class_ids": torch.tensor([3, 3])}
    with torch.no_grad():
        without, of_class_1 = denoiser(**arguments), denoiser(**arguments | {"class_ids": torch.tensor([1, 1])})
        of_class_0 = denoiser(**arguments | {"class_ids": torch.tensor([0, 0])})
    assert torch.equal(without, of_class_0) == (null_row == 0)
    assert not torch.equal(without, of_class_1)


@pytest.mark.parametrize("num_classes", [None, 100, 103])
def test_another_number_of_classes_is_refused_with_the_legal_ones(num_classes: int | None) -> None:
    config = DenoiserConfig(**SMALL, num_classes=num_classes)
    with pytest.raises(CheckpointError, match=rf"has 102 rows.*num_classes={num_classes} .*num_classes=101 .* or 102 "):
        convert_released_state_dict({TABLE: torch.zeros(102, SMALL["width"])}, config)
