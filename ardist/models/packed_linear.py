"""Linear layers for inference on a CPU, with the weight laid out once as the processor's matrix kernel wants it.

An ordinary linear layer rearranges its weight in every call. That is nothing beside a training batch, but half of the
time where a call has a few dozen rows, as a sampler has that evaluates one frame after the other.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

ROWS_HINT = 32
"""Rows that the layout is chosen for; layouts for 32 and for 512 rows were equally fast at both."""


class PackedLinear(nn.Module):
    """A frozen linear layer; a copy of the weight, which later changes of the original do not reach."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)

    def forward(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b n"]:
        """As `torch.nn.Linear`, up to the rounding of sums in another order."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return result


def can_pack(weight: Tensor) -> bool:
    """Whether this build of PyTorch has the kernel for a weight of this type and device (fp32 on a CPU)."""
    names = (
        "_reorder_linear_weight",
        "_linear_pointwise",
    )  # what torch.compile itself uses, but not a public interface
    has_kernel = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has_kernel and weight.device.type == "cpu" and weight.dtype == torch.float32


def pack_linears(module: nn.Module, *, keep: tuple[str, ...] = ()) -> None:
    """Replace the linear layers right below `module`, except those named in `keep`, in place.

    What only derives from a linear layer, or has hooks, does more than a product and stays.
    """
    for name, child in module.named_children():
        hooked = child._forward_hooks or child._forward_pre_hooks
        if type(child) is nn.Linear and not hooked and name not in keep:
            setattr(module, name, PackedLinear(child))
