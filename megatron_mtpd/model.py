"""`MTPDModel`: Megatron's HybridModel with MTP heads, and the MTP-D loss in the place of Megatron's.

The seam. `HybridModel.forward` returns the hidden states of main model and heads when it is told that it is not the
last stage; everything after them, the output layer and the losses, is ours. So nothing of Megatron is copied, and the
layers, parallelism, recomputation and checkpoints of main model and heads are Megatron's own.

The contract with Megatron's loop is unchanged: with labels, `forward` returns the main head's per-token loss [b, s],
and the heads' losses ride on its gradient (`losses.eager.attach_heads_loss`). `loss_report` holds the sums of the last
call.

Deliberately absent: optimisation, data, reports. Inference goes through `hidden_states_of_all_heads` and `logits`.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.alignment import head_masks
from megatron_mtpd.losses.drafts import draft_tokens, on_policy_positions
from megatron_mtpd.losses.eager import HeadWeights, attach_heads_loss, mtpd_loss
from megatron_mtpd.losses.fused import fused_mtpd_loss
from megatron_mtpd.losses.gradients import scale_gradient
from megatron_mtpd.losses.halo import Halo
from megatron_mtpd.losses.report import LossReport
from megatron_mtpd.specs import hybrid_stack_spec


class MTPDModel(HybridModel):
    """HybridModel whose MTP heads learn from the main head.

    Args:
        mtpd: the method's options.
        eod_token_id: the end-of-document token; heads form no pairs across it. None: documents are not told apart.
        rope_scaling_factor: of Llama 3's scaled rotary positions; None: they are not scaled.
        others: as HybridModel.

    Attributes:
        iteration: counted from 0, set by the training loop before each step; the schedules follow from it.
        loss_report: sums of the last forward pass with labels, on the last pipeline stage.

    Raises ValueError for options that do not go together.
    """

    def __init__(
        self,
        *args: Any,
        mtpd: MTPDConfig | None = None,
        eod_token_id: int | None = None,
        rope_scaling_factor: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if rope_scaling_factor is not None:
            self.rotary_pos_emb = self._scaled_rotary_positions(rope_scaling_factor, **kwargs)
        self.mtpd = mtpd or MTPDConfig()
        self.eod_token_id = eod_token_id
        self.iteration = 0
        self.loss_report: LossReport | None = None
        self._shares = (1.0, 1.0)  # of trunk and embedding, for the pass of the heads that runs next
        self._heads_inputs: dict[str, Any] = {}
        self._depth = 0  # heads that have begun in the present pass
        self._drafts: list[Tensor] = []  # of heads 1, 2, ...; found in the first pass
        num_heads = self.config.mtp_num_layers or 0
        if num_heads:
            self.alphas = self.mtpd.alphas(num_heads, self.config.mtp_loss_scaling_factor)
            self.betas = self.mtpd.betas(num_heads)
        if self.mtpd.heads_pass_twice and "E" in (self.mtp_pattern or ""):
            raise ValueError(
                f"Heads with a mixture of experts (pattern {self.mtp_pattern!r}) need equal shares for cross-entropy "
                "and distillation: a second pass of the heads would count the router's auxiliary loss twice. Set "
                "--mtpd-kd-trunk-share and --mtpd-kd-embedding-share to the values of --mtpd-ce-..., or use dense "
                "heads ('*-')."
            )
        if self.mtp_process and self.share_embeddings_and_output_weights and not self.pre_process:
            # The heads' embedding is the shared weight. megatron-core 0.19 keeps an unused one here, which its own
            # checkpoint refuses.
            self.output_layer.weight = None
        if self.mtp_process:
            self.mtp.register_forward_pre_hook(self._gate_heads, with_kwargs=True)
            if self.mtpd.clip_apart:
                for parameter in self.mtp.parameters():
                    parameter.grad_norm_group = "mtp"  # the group that Megatron's optimizers clip by itself
            if self.mtpd.on_policy_fraction:
                for layer in self.mtp.layers:
                    layer.register_forward_pre_hook(self._feed_drafts, with_kwargs=True)

    def _scaled_rotary_positions(
        self, factor: float, rotary_percent: float = 1.0, rotary_base: int = 10000, **_others: Any
    ) -> RotaryEmbedding:
        """What megatron-core 0.19 gives to GPTModel for --use-rope-scaling, and to HybridModel not."""
        return RotaryEmbedding(
            self.config.kv_channels,
            rotary_percent,
            rotary_base=rotary_base,
            rope_scaling=True,
            rope_scaling_factor=factor,
            use_cpu_initialization=self.config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )

    # Hidden states -----------------------------------------------------------------------------------------------

    def _gate_heads(self, _module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the heads run: keep what they are given, and hand them its gated form."""
        self._heads_inputs = dict(kwargs)
        self._depth = 0
        trunk_share, embedding_share = self._shares
        embedding = kwargs["embedding"]

        def gated_embedding(**inputs: Tensor) -> Tensor:
            return scale_gradient(embedding(**inputs), embedding_share)

        gated = scale_gradient(kwargs["hidden_states"], trunk_share)
        return args, {**kwargs, "hidden_states": gated, "embedding": gated_embedding}

    def _feed_drafts(self, _layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before head k runs, k >= 2: at some positions, let it look up what head k - 1 drafts there.

        Head k - 1 at i drafts token i + k, the one whose embedding head k takes at i: no shift is needed. The tokens
        that are handed on from head to head remain the text's.
        """
        self._depth += 1
        if self._depth == 1 or not self.training:
            return args, kwargs
        if len(self._drafts) < self._depth - 1:
            group, is_split = self.pg_collection.tp, self.config.sequence_parallel
            drafts = draft_tokens(kwargs["hidden_states"], self._output_weight(), group, sequence_parallel=is_split)
            self._drafts.append(drafts.t())
        drafts, embedding = self._drafts[self._depth - 2], kwargs["embedding"]
        fraction, cp_group = self.mtpd.on_policy_fraction, self.pg_collection.cp
        is_fed = on_policy_positions(drafts.shape[1], fraction, self.iteration, cp_group)
        is_fed = is_fed.to(drafts.device, non_blocking=True)

        def embedding_of_drafts(input_ids: Tensor, **others: Tensor) -> Tensor:
            return embedding(input_ids=torch.where(is_fed, drafts, input_ids), **others)

        return args, {**kwargs, "embedding": embedding_of_drafts}

    @contextmanager
    def _stop_at_hidden_states(self) -> Iterator[None]:
        self.post_process = False
        try:
            yield
        finally:
            self.post_process = True

    def hidden_states_of_all_heads(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """On the last pipeline stage: hidden states of the main model, of the heads for cross-entropy, and for
        distillation.

        Arguments as HybridModel.forward. Each tensor is [s, b, h] ([s / tp, b, h] with sequence parallelism), after its
        final norm. The two lists are the same, unless gradients are let through differently (`heads_pass_twice`).
        """
        config = self.mtpd
        self._drafts = []
        self._shares = (config.ce_trunk_share, config.ce_embedding_share)
        with self._stop_at_hidden_states():
            stacked = super().forward(*args, **kwargs)
        num_heads = self.config.mtp_num_layers
        # The heads' block stacks its gated input in front: the main head needs the one that is not gated.
        main = self._heads_inputs["hidden_states"]
        for_ce = list(torch.chunk(stacked, 1 + num_heads))[1:]
        for_kd = for_ce
        if config.heads_pass_twice and torch.is_grad_enabled():
            self._shares = (config.kd_trunk_share, config.kd_embedding_share)
            for_kd = list(torch.chunk(self.mtp(**self._heads_inputs), 1 + num_heads))[1:]
        self._heads_inputs, self._drafts = {}, []
        return main, for_ce, for_kd

    # Logits ------------------------------------------------------------------------------------------------------

    def logits(self, hidden_states: Tensor, output_share: float = 1.0) -> Tensor:
        """[s, b, h] -> [s, b, V / tp] through the shared output layer; its gradient to the weight times
        `output_share`."""
        shared = self._output_weight() if self.share_embeddings_and_output_weights else None
        if output_share == 1.0 or not torch.is_grad_enabled():
            return self._scale_logits(self.output_layer(hidden_states, weight=shared)[0])
        cut = self._scale_logits(self.output_layer(hidden_states, weight=self._output_weight().detach())[0])
        if output_share == 0.0:
            return cut
        # Not a scaled weight: fused accumulation writes into the parameter's own gradient buffer, so it must see the
        # parameter. Half from the cut product and half from the whole one gives the weight half of the gradient.
        return torch.lerp(cut, self.logits(hidden_states), output_share)

    def _output_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        # As if the layer ran: its hooks wait until the weight is gathered (--overlap-param-gather).
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        return self.output_layer.weight

    def _logit_scale(self) -> float:
        return self.config.mup_output_mult if self.config.use_mup else 1.0

    # Loss --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As HybridModel.forward: per-token loss of the main head [b, s] fp32 with labels, logits [b, s, V / tp]
        without.

        Args:
            input_ids, position_ids, labels: int64 [b, s]. `labels[:, j]` is token j + 1.
            loss_mask: [b, s] of 0 and 1; None: all ones.

        With labels, the gradient of the heads' losses is attached to the result, for a caller that reduces it as
        `c * (losses * loss_mask).sum()`. Raises ValueError for packed sequences.
        """
        if kwargs.get("packed_seq_params") is not None:
            raise ValueError(
                "Packed sequences (THD) are not supported with MTP-D heads: use [b, s] batches, where documents are "
                "told apart by the end-of-document token (and, with local layers, --reset-attention-mask)."
            )
        inputs = (input_ids, position_ids, attention_mask, *args)
        if not self.post_process or not self.mtp_process:
            return super().forward(*inputs, labels=labels, loss_mask=loss_mask, **kwargs)
        main, for_ce, for_kd = self.hidden_states_of_all_heads(*inputs, **kwargs)
        if labels is None:
            return self.logits(main).transpose(0, 1).contiguous()
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.float32)
        main_loss, heads_loss, self.loss_report = self._losses(
            main, for_ce, for_kd, labels.t(), loss_mask.t(), self._document_ends(input_ids)
        )
        if torch.is_grad_enabled():
            main_loss = attach_heads_loss(main_loss, loss_mask.t(), heads_loss)
        return main_loss.t().contiguous()

    def _losses(
        self,
        main: Tensor,
        for_ce: list[Tensor],
        for_kd: list[Tensor],
        labels: Tensor,
        loss_mask: Tensor,
        document_ends: Tensor | None,
    ) -> tuple[Tensor, Tensor, LossReport]:
        config = self.mtpd.at(self.iteration)
        distill_scale = config.distill_scale(self.iteration)
        halo = Halo(len(for_ce), self.pg_collection.cp)
        labels, all_positions = halo.extend(labels), halo.extend(loss_mask)
        document_ends = None if document_ends is None else halo.extend(document_ends)
        masks = halo.own(head_masks(all_positions, len(for_ce), document_ends, config.cross_documents))
        loss_mask = halo.own(all_positions)
        weights = HeadWeights(
            self.alphas,
            tuple(beta * distill_scale for beta in self.betas),
            per_head_mean=not self.config.calculate_per_token_loss,
            count_group=halo.group,
        )
        if config.loss == "fused":
            sequence_parallel = self.config.sequence_parallel
            if halo.group is not None and sequence_parallel:
                main, for_ce, for_kd = self._gathered(main, for_ce, for_kd)
                sequence_parallel = False
            is_same = for_kd is for_ce
            for_ce = [halo.pad(x) for x in for_ce]
            main_loss, heads_loss, report = fused_mtpd_loss(
                halo.extend(main),
                for_ce,
                for_ce if is_same else [halo.pad(x) for x in for_kd],
                self._output_weight(),
                labels,
                loss_mask,
                masks,
                weights,
                config,
                self.pg_collection.tp,
                sequence_parallel=sequence_parallel,
                logit_scale=self._logit_scale(),
                accumulate_into_main_grad=self.config.gradient_accumulation_fusion,
            )
            return halo.restore(main_loss), heads_loss, report
        ce_logits = [halo.pad(self.logits(h, config.ce_output_share)) for h in for_ce]
        has_same_gradients = config.kd_output_share == config.ce_output_share or not torch.is_grad_enabled()
        if for_kd is for_ce and has_same_gradients:
            kd_logits = ce_logits
        else:
            kd_logits = [halo.pad(self.logits(h, config.kd_output_share)) for h in for_kd]
        tp_group = self.pg_collection.tp if self.parallel_output else None
        main_loss, heads_loss, report = mtpd_loss(
            halo.extend(self.logits(main)), ce_logits, kd_logits, labels, loss_mask, masks, weights, config, tp_group
        )
        return halo.restore(main_loss), heads_loss, report

    def _gathered(self, main: Tensor, for_ce: list[Tensor], for_kd: list[Tensor]) -> tuple[Tensor, list, list]:
        """[s / tp, b, h] -> [s, b, h] each. Their gradients come back whole, and each rank takes its part."""

        def gathered(x: Tensor) -> Tensor:
            tp = self.pg_collection.tp
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=tp)

        ce = [gathered(x) for x in for_ce]
        return gathered(main), ce, ce if for_kd is for_ce else [gathered(x) for x in for_kd]

    def _document_ends(self, input_ids: Tensor) -> Tensor | None:
        return None if self.eod_token_id is None else (input_ids == self.eod_token_id).t()


@dataclass(kw_only=True)
class MTPDModelConfig(HybridModelConfig):
    """HybridModelConfig, the method's options and the end-of-document token: all that `MTPDModelBuilder` needs."""

    builder: ClassVar[str] = "megatron_mtpd.model.MTPDModelBuilder"
    mtpd: MTPDConfig = field(default_factory=MTPDConfig)
    eod_token_id: int | None = None
    rope_scaling_factor: float | None = None

    @classmethod
    def from_args(cls, args: Namespace) -> Self:
        """Megatron's `hybrid_config_from_args`, with the flags that it overlooks.

        Raises ValueError for --use-rope-scaling where rotary positions are not plain ones.
        """
        config: Self = hybrid_config_from_args(args, model_config_cls=cls)
        if getattr(args, "use_rope_scaling", False):
            interpolation = args.rotary_seq_len_interpolation_factor
            others = {
                f"--position-embedding-type {args.position_embedding_type}": args.position_embedding_type != "rope",
                "--multi-latent-attention": args.multi_latent_attention,
                f"--rotary-seq-len-interpolation-factor {interpolation}": interpolation is not None,
            }
            if wrong := [flag for flag, given in others.items() if given]:
                raise ValueError(
                    f"--use-rope-scaling scales plain rotary positions, and has no meaning with {wrong[0]}."
                )
            config.rope_scaling_factor = float(args.rope_scaling_factor)
        return config


class MTPDModelBuilder(HybridModelBuilder):
    """Builds `MTPDModel` stages, of Transformer Engine's modules where they run and of local ones elsewhere."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MTPDModel:
        """Build one pipeline stage; whether it holds embedding and output layer follows from its place in
        `pg_collection`."""
        config: MTPDModelConfig = self._model_config
        if config.vocab_size is None:
            raise ValueError("vocab_size of the model is not set: give --vocab-size or a tokenizer.")
        # Whatever field of the configuration is named like an argument of the model is that argument.
        arguments = inspect.signature(HybridModel.__init__).parameters
        kwargs = {f.name: getattr(config, f.name) for f in fields(config) if f.name in arguments}
        kwargs |= {
            "config": config.transformer,
            "hybrid_stack_spec": config.hybrid_stack_spec or hybrid_stack_spec(config.transformer),
            "max_sequence_length": config.seq_length,
            "pre_process": is_pp_first_stage(pg_collection.pp) if pre_process is None else pre_process,
            "post_process": is_pp_last_stage(pg_collection.pp) if post_process is None else post_process,
            "pg_collection": pg_collection,
            "vp_stage": vp_stage,
        }
        if config.should_pad_vocab:
            kwargs["vocab_size"] = calculate_padded_vocab_size(
                config.vocab_size,
                config.make_vocab_size_divisible_by,
                config.transformer.tensor_model_parallel_size,
            )
        ours = {name: getattr(config, name) for name in ("mtpd", "eod_token_id", "rope_scaling_factor")}
        return MTPDModel(**kwargs, **ours)
