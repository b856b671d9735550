"""Matrix products on a CPU with weights in oneDNN's own order.

Decoding multiplies a few rows by every weight. torch's `linear` on a CPU, which is MKL's product, is far from what the
memory allows there on AMD's processors, where two rows cost it about twice one; with the weight reordered once, a few
rows cost about half of that. On Intel's (a Xeon with AMX) it is ahead for up to three rows, and behind at five
(`tools/benchmark_decoding.py` measures decoding beside transformers, which uses `linear`). torch's compiler reorders
weights in the same way when it freezes a model.

The price is memory: a reordered copy of each fp32 weight beside the weight itself.

Deliberately absent: gradients, other dtypes and devices; those take `linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

LEAST_ROWS = 4 if "Intel" in torch.cpu.get_capabilities().get("cpu_name", "") else 1
"""Products of fewer rows take `linear`."""


def shared_packed(weight: Tensor) -> PackedWeight:
    """The one of a weight, which all that multiply by it share; it goes with the weight."""
    if (found := _shared.get(weight)) is None:
        found = _shared[weight] = PackedWeight()
    return found


class PackedWeight:
    """Computes `linear(x, weight, bias)` for one weight, whose reordered copy it makes and keeps.

    The copy is made again when the weight has changed, by any in-place operation that torch counts (not through
    `weight.data`).
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._packed_from: tuple[int, int] | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] x [out, in] -> [..., out]."""
        if not _can_pack(x, weight):
            return linear(x, weight, bias)
        current = (weight.data_ptr(), weight._version)
        if self._packed_from != current:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self._packed_from = current
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")


def _can_pack(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() >= LEAST_ROWS * x.shape[-1]
        and weight.dtype == torch.float32 == x.dtype
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and not weight.is_inference()  # its changes are not counted
    )


_shared = WeakTensorKeyDictionary()
