"""Which position of which head belongs to which target, and where no pair is formed.

Positions are counted on the sequence, heads from 1. The main head at position j predicts token j + 1. Head k at
position i has seen the tokens up to i + k and predicts token i + k + 1: the token that the main head predicts at j = i
+ k. So everything of the target (label, teacher) is brought to the head's position by a shift of k to the left.

Tensors are sequence-first, [s, b, ...]. A `Shift` is an argument because under context parallelism the sequence is
spread over ranks; `shift_left` is the one for whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shift = Callable[[Tensor, int], Tensor]


def shift_left(x: Tensor, k: int) -> Tensor:
    """x[i] := x[i + k] along the sequence, zeros from beyond its end. [s, ...] -> [s, ...].

    tokens            t0 t1 t2 t3 t4          position  0  1  2  3  4
    labels            t1 t2 t3 t4 t5          main head: label j is token j + 1
    shift(labels, 1)  t2 t3 t4 t5  0          head 1 at i = 0 has seen t0, t1 and predicts t2
    shift(labels, 2)  t3 t4 t5  0  0          head 2 at i = 0 has seen t0, t1, t2 and predicts t3
    """
    if k == 0:
        return x
    return torch.cat([x[k:], torch.zeros_like(x[:k])])


def head_masks(
    loss_mask: Tensor,
    num_heads: int,
    document_ends: Tensor | None = None,
    cross_documents: bool = False,
    shift: Shift = shift_left,
) -> Tensor:
    """1 where head k has a target that it may learn from. [s, b] -> [K, s, b], dtype of `loss_mask`.

    The head at i with its target at i + k counts when every position from i to i + k is unmasked and none of them ends
    a document (`document_ends`, bool [s, b], true where the *input* token is an end-of-document token). So no pair
    crosses a document end, padding or a masked position, and the mask of head k implies that of head k - 1:

        tokens            a1 a2 a3 EOD b1 b2        loss_mask all ones
        head 1             1  1  0   0  1  0        a2 -> EOD is predicted (a document ends); EOD -> b1 is not
        head 2             1  0  0   0  0  0

    `cross_documents=True` is Megatron's own rule: only the target's own loss mask counts.
    """
    masks = []
    usable = loss_mask if document_ends is None else loss_mask * (~document_ends).to(loss_mask.dtype)
    chain = usable
    for k in range(1, num_heads + 1):
        chain = chain * shift(usable, k)
        masks.append(shift(loss_mask, k) if cross_documents else chain)
    return torch.stack(masks)
