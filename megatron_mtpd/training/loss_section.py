"""One step of the loss section, in three variants, on the same inputs: what `benchmark_loss` times.

`prepare` builds the inputs and returns the step: from the hidden states of main model and heads, [(1 + K) * s, b, h],
to the gradients of them and of the output weight. Importing this module prepares the machine (`platform.setup`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.language_module.language_module import LanguageModule  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.multi_token_prediction import process_mtp_loss  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_mtpd.config import MTPDConfig  # noqa: E402
from megatron_mtpd.losses.alignment import head_masks  # noqa: E402
from megatron_mtpd.losses.eager import HeadWeights, attach_heads_loss, mtpd_loss  # noqa: E402
from megatron_mtpd.losses.fused import fused_mtpd_loss  # noqa: E402
from megatron_mtpd.training.measure import has_gpu  # noqa: E402

if TYPE_CHECKING:
    from megatron_mtpd.training.benchmark_loss import Workload

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(variant: str, workload: Workload, store: str) -> Callable[[], None]:
    """Starts this rank's process group and returns a function that runs one step. All variants get the same numbers."""
    if has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if has_gpu() else "gloo",
        store=dist.FileStore(store, workload.tp),
        rank=int(os.environ["RANK"]),
        world_size=workload.tp,
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=workload.tp)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    small = replace(workload, vocab=64 * workload.tp, tokens=8 * workload.tp, hidden=16 * workload.tp)
    _build(variant, small, groups)()  # libraries load what they need at their first call: not memory of the step
    return _build(variant, workload, groups)


def _build(variant: str, workload: Workload, groups: ProcessGroupCollection) -> Callable[[], None]:
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")
    dtype = _DTYPES[workload.dtype]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=workload.hidden,
        num_attention_heads=workload.tp,
        mtp_num_layers=workload.heads,
        tensor_model_parallel_size=workload.tp,
        sequence_parallel=workload.sequence_parallel,
        params_dtype=dtype,
        bf16=workload.dtype == "bf16",
        fp16=workload.dtype == "fp16",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    output_layer = ColumnParallelLinear(
        workload.hidden,
        workload.vocab,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        gather_output=False,
        tp_group=groups.tp,
    ).to(device)
    positions = workload.tokens // (workload.tp if workload.sequence_parallel else 1)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    with torch.no_grad():
        whole = normal(workload.vocab, workload.hidden) * workload.hidden**-0.5
        output_layer.weight.copy_(whole.chunk(workload.tp)[groups.tp.rank()])
        del whole
        # Heads that resemble the main model, as trained ones do; logits of deviation 3.
        main = normal(workload.tokens, 1, workload.hidden)
        states = [main, *(0.8 * main + 0.6 * normal(*main.shape) for _ in range(workload.heads))]
        mine = slice(groups.tp.rank() * positions, None) if workload.sequence_parallel else slice(None)
        hidden = torch.cat([3.0 * x[mine][:positions] for x in states]).to(dtype).to(device).requires_grad_()
    labels = torch.randint(workload.vocab, (1, workload.tokens), generator=generator).to(device)
    mask = torch.ones(1, workload.tokens, device=device)
    loss = _Megatron(config, groups) if variant == "megatron_mtp" else _MTPD(variant, workload, groups)

    def step() -> None:
        output_layer.weight.grad = hidden.grad = None
        losses = loss(hidden, output_layer, labels, mask)
        ((losses * mask).sum() / mask.sum()).backward()
        if has_gpu():
            torch.cuda.synchronize()

    return step


class _Megatron(LanguageModule):
    """What HybridModel does with the hidden states: heads first, then the main head."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection=groups)

    def forward(self, hidden: Tensor, output_layer: Any, labels: Tensor, mask: Tensor) -> Tensor:
        main = process_mtp_loss(
            hidden_states=hidden,
            labels=labels,
            loss_mask=mask,
            output_layer=output_layer,
            output_weight=None,
            runtime_gather_output=None,
            is_training=True,
            compute_language_model_loss=self.compute_language_model_loss,
            config=self.config,
            cp_group=self.pg_collection.cp,
            tp_group=self.pg_collection.tp,
        )
        return self.compute_language_model_loss(labels, output_layer(main)[0])


class _MTPD:
    """The two implementations of the MTP-D loss."""

    def __init__(self, variant: str, workload: Workload, groups: ProcessGroupCollection) -> None:
        self.is_fused, self.workload, self.group = variant == "mtpd_fused", workload, groups.tp
        heads = workload.heads
        self.config = MTPDConfig.as_published(objective=workload.objective, top_n=workload.topn)
        self.weights = HeadWeights(self.config.alphas(heads, 0.1), self.config.betas(heads))

    def __call__(self, hidden: Tensor, output_layer: Any, labels: Tensor, mask: Tensor) -> Tensor:
        main, *heads = hidden.chunk(1 + self.workload.heads)
        labels, mask = labels.t(), mask.t()
        masks = head_masks(mask, len(heads))
        if self.is_fused:
            main_loss, heads_loss, _ = fused_mtpd_loss(
                main,
                heads,
                heads,
                output_layer.weight,
                labels,
                mask,
                masks,
                self.weights,
                self.config,
                self.group,
                sequence_parallel=self.workload.sequence_parallel,
            )
        else:
            logits, *of_heads = [output_layer(x)[0] for x in (main, *heads)]
            main_loss, heads_loss, _ = mtpd_loss(
                logits, of_heads, of_heads, labels, mask, masks, self.weights, self.config, self.group
            )
        return attach_heads_loss(main_loss, mask, heads_loss).t()
