"""BioD2C (Ji et al., 2025): one class for each box of the paper's Fig. 2, in the figure's order.

    image ──► vision encoder ──► X_v ──► multi-scale feature enhancement ──► X'_v ─┐
                                  │                                                ▼
    question ──► ε ──► MLP ──► X_t ─────────────── query ─────────────► fusion decoder ──► X_vt
                                  │                                                │
                                  └──► Proj(X_v) ──────► gate (eq. 2) ◄──── Proj_g(X_vt)
                                                            │
    prompt with <image> × Q  ◄──────────────────────────── X_v|t ──► semantic loss against the text queue (eq. 3, 4)
        └──► language model ──► answer, L_nll                        L = λ·L_sem + L_nll (eq. 5)

Unusual here, and why:
- This file imports only torch, transformers and its own configuration: a checkpoint carries it to machines that have
  never seen the repository (`trust_remote_code`).
- The multi-scale features are a pooling pyramid (the mean of means, the max of maxes), not a loop over 1365 blocks; and
  the decoder's cross-attention folds the key and value projections into its few queries, so that no key or value of the
  many cells is ever made. Both equal the direct computation up to rounding.
- Frozen parts stay in eval mode while the rest trains: BatchNorm statistics of a frozen trunk must not move.

Letters in shapes: B rows, I images, L prompt tokens, Q visual = question tokens, D vision width, H language-model
width, N×N grid cells, M multi-scale cells, k queue texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple, torch_compilable_check

from .configuration_biod2c import BioD2CConfig, BioD2CVisionConfig

# ------------------------------------------------------------------------------------------ vision encoder (PMC-CLIP)


class Bottleneck(nn.Module):
    """CLIP's bottleneck block: strides are average pools, which keep what a strided convolution would skip."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        shortcut = x if self.downsample is None else self.downsample(self.avgpool(x))
        return F.relu(out + shortcut)


class AttentionPool2d(nn.Module):
    """CLIP's attention pool: the mean cell asks all cells. [I, C, n, n] -> [I, projection_dim]."""

    def __init__(self, side: int, channels: int, num_heads: int, projection_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.empty(side**2 + 1, channels))
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).transpose(1, 2)  # [I, n², C]
        cells = torch.cat([cells.mean(1, keepdim=True), cells], 1) + self.positional_embedding
        query, key, value = self.q_proj(cells[:, :1]), self.k_proj(cells), self.v_proj(cells)
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value)]
        pooled = F.scaled_dot_product_attention(*heads)  # [I, heads, 1, C / heads]
        return self.c_proj(pooled.flatten(1))


@dataclass
class BioD2CVisionOutput(ModelOutput):
    """`image_grid` [I, D, N, N], the paper's X_v; with the attention pool also `image_features` [I, projection_dim]."""

    image_grid: Tensor | None = None
    image_features: Tensor | None = None


class BioD2CVisionModel(PreTrainedModel):
    """PMC-CLIP's ModifiedResNet, up to the stage whose grid is X_v (paper section 3.1, "Image Processing").

    With `config.attention_pool` all stages and the attention pool are built: PMC-CLIP's whole image encoder.
    """

    config: BioD2CVisionConfig
    config_class = BioD2CVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["Bottleneck"]

    def __init__(self, config: BioD2CVisionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        stages = config.layers if config.attention_pool else config.layers[: config.out_stage]
        in_channels = width
        for stage, blocks in enumerate(stages):
            channels = width * 2**stage
            first = Bottleneck(in_channels, channels, stride=1 if stage == 0 else 2)
            rest = [Bottleneck(4 * channels, channels, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            in_channels = 4 * channels
        self.num_stages = len(stages)
        self.channels = [config.hidden_size]  # as transformers' backbones say it
        if config.attention_pool:
            side = config.image_size // config.stride
            self.attnpool = AttentionPool2d(side, in_channels, config.attention_pool_heads, config.projection_dim)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BioD2CVisionOutput:
        """pixel_values [I, 3, image_size, image_size] -> `BioD2CVisionOutput`."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        grid = None
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
            if stage == self.config.out_stage:
                # it is read cell by cell, so its channels had best lie together. Convolutions in that layout would
                # round otherwise than the authors'
                grid = x.contiguous(memory_format=torch.channels_last)
        image_features = self.attnpool(x) if self.config.attention_pool else None
        return BioD2CVisionOutput(image_grid=grid, image_features=image_features)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, AttentionPool2d):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[-1] ** -0.5)


# ---------------------------------------------------------------------------------- feature-level interaction (Fig. 2)


class TextEncoderMLP(nn.Module):
    """X_t = MLP(ε(T)) (paper section 3.1, "Text Encoding"). [B, Q, H] -> [B, Q, D].

    ε is the language model's own embedding table, so this holds the MLP only. Padding rows come out as zeros.
    """

    def __init__(self, config: BioD2CConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.text_config.hidden_size, config.text_mlp_dim)
        self.linear2 = nn.Linear(config.text_mlp_dim, config.vision_hidden_size)

    def forward(self, question_embeds: Tensor, question_mask: Tensor | None) -> Tensor:
        text = self.linear2(F.relu(self.linear1(question_embeds)))
        return text if question_mask is None else text.masked_fill(~question_mask[..., None], 0.0)


class MultiScaleFeatureEnhancement(nn.Module):
    """X'_v: scale s cuts the grid into 2^(s-1) × 2^(s-1) blocks, each max-pooled + mean-pooled (section 3.1, "MFE").

    Scales run coarse to fine, row-major inside a scale. Where a scale's blocks do not divide the side, the blocks are
    those of torch's adaptive pooling, which overlap by a cell rather than lose one.
    """

    def __init__(self, num_scales: int) -> None:
        super().__init__()
        self.num_scales = num_scales

    def forward(self, grid: Tensor) -> Tensor:
        """grid [B, D, N, N] -> [B, M, D] with M = Σ 4^(s-1).

        Raises:
            ValueError: if the finest scale has more blocks a side than the grid has cells.
        """
        side, finest = min(grid.shape[-2:]), 2 ** (self.num_scales - 1)
        if finest > side:
            raise ValueError(f"num_scales={self.num_scales} needs a grid of at least {finest} cells a side, got {side}")
        grid = grid.contiguous(memory_format=torch.channels_last)  # pooling then runs along the channels
        if grid.shape[-1] % finest or grid.shape[-2] % finest:
            scales = [
                F.adaptive_avg_pool2d(grid, 2**s) + F.adaptive_max_pool2d(grid, 2**s) for s in range(self.num_scales)
            ]
        else:
            # the mean of means and the max of maxes: each scale comes from the next finer one
            block = (grid.shape[-2] // finest, grid.shape[-1] // finest)
            one_cell = block == (1, 1)  # the finest blocks are single cells, each its own mean and maximum
            mean, peak = (grid, grid) if one_cell else (F.avg_pool2d(grid, block), F.max_pool2d(grid, block))
            scales = [grid if one_cell else mean + peak]
            for _ in range(self.num_scales - 1):
                mean = F.avg_pool2d(mean, 2)
                peak = torch.maximum(peak[..., ::2, :], peak[..., 1::2, :])  # max_pool2d would store where each one was
                peak = torch.maximum(peak[..., ::2], peak[..., 1::2])
                scales.insert(0, mean + peak)
        cells = torch.cat([scale.permute(0, 2, 3, 1).flatten(1, 2) for scale in scales], dim=1)
        if finest == grid.shape[-1] == grid.shape[-2]:
            cells[:, -(finest**2) :] *= 2  # mean + maximum of a single cell, in place: it is three quarters of all
        return cells


class DecoderAttention(nn.Module):
    """The weights of one multi-head attention, laid out as in torch's MultiheadAttention, and so in the authors' file.

    The input projections are parameters of this module, not of a child: ZeRO-3 gathers what the module that runs owns.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, Q, D / heads]


class SelfAttention(DecoderAttention):
    """Attention among the Q queries; a padding query is never attended to."""

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """x [B, Q, D], key_mask [B, Q] True where real (None: all) -> [B, Q, D]."""
        query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(
            self.split_heads(query),
            self.split_heads(key),
            self.split_heads(value),
            attn_mask=None if key_mask is None else key_mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(DecoderAttention):
    """Q queries over many image cells, with the key and value projections absorbed.

    softmax((x W_q)(c W_k)ᵀ) (c W_v) = softmax(((x W_q) W_kᵀ) cᵀ) c W_v: the heads' queries are brought to the cells'
    own width, all heads read the same raw cells c, and W_v is applied to the Q sums instead of the M cells. With Q = 32
    and M = 1365 that is about a quarter of the arithmetic and no key or value tensor. The key bias adds the same to
    every score of a query, so the softmax cancels it. Under dropout a row of weights no longer sums to one: the value
    bias is weighted by the sum that is left.
    """

    def forward(self, x: Tensor, cells: Tensor, cell_positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, Q, D], cells [B, M, D], cell_positions [M, D] for the keys -> [B, Q, D], weights [B, heads, Q, M]."""
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, _, bias_v = self.in_proj_bias.chunk(3)
        query = self.split_heads(F.linear(x, weight_q, bias_q))  # [B, heads, Q, d]
        head_dim = query.shape[-1]
        # einsum, for matmul would copy the weights for each row of the batch, and keep the copies until backward
        absorbed = torch.einsum("bhqd,hdw->bhqw", query, weight_k.unflatten(0, (self.num_heads, head_dim)))
        keys = cells if cell_positions is None else cells + cell_positions
        scores = absorbed.flatten(1, 2) @ keys.transpose(1, 2) * head_dim**-0.5  # [B, heads·Q, M]
        weights = scores.softmax(-1)
        dropped = F.dropout(weights, self.dropout, self.training)
        context = (dropped @ cells).unflatten(1, (self.num_heads, -1))  # [B, heads, Q, D]
        values = torch.einsum("bhqw,hdw->bhqd", context, weight_v.unflatten(0, (self.num_heads, head_dim)))
        weight_sums = dropped.sum(-1).unflatten(1, (self.num_heads, -1))[..., None]  # [B, heads, Q, 1]
        values = values + weight_sums * bias_v.unflatten(0, (self.num_heads, 1, head_dim))
        attended = self.out_proj(values.transpose(1, 2).flatten(2))
        return attended, weights.unflatten(1, (self.num_heads, -1))


class FusionDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm DETR decoder layer: self-attention, cross-attention, feed-forward, each added to what comes in."""

    def __init__(self, config: BioD2CConfig) -> None:
        super().__init__()
        width, dropout = config.vision_hidden_size, config.fusion_dropout
        self.self_attn = SelfAttention(width, config.fusion_heads, dropout)
        self.cross_attn = CrossAttention(width, config.fusion_heads, dropout)
        self.linear1 = nn.Linear(width, config.fusion_ffn_dim)
        self.linear2 = nn.Linear(config.fusion_ffn_dim, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, cells: Tensor, cell_positions: Tensor | None, query_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = x + self.dropout(self.self_attn(self.norm1(x), query_mask))
        attended, weights = self.cross_attn(self.norm2(x), cells, cell_positions)
        x = x + self.dropout(attended)
        hidden = self.dropout(F.relu(self.linear1(self.norm3(x))))
        return x + self.dropout(self.linear2(hidden)), weights


class FusionDecoder(nn.Module):
    """Fusion(query, cells, cells) of eq. 1: the Transformer decoder. No causal mask."""

    def __init__(self, config: BioD2CConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionDecoderLayer(config) for _ in range(config.fusion_layers))
        self.norm = nn.LayerNorm(config.vision_hidden_size)

    def forward(
        self,
        queries: Tensor,
        cells: Tensor,
        cell_positions: Tensor | None = None,
        query_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """queries [B, Q, D], cells [B, M, D] -> [B, Q, D] and, if asked for, the weights [B, layers, heads, Q, M]."""
        attentions = []
        for layer in self.layers:
            queries, weights = layer(queries, cells, cell_positions, query_mask)
            if output_attentions:
                attentions.append(weights)
        return self.norm(queries), torch.stack(attentions, dim=1) if output_attentions else None


class Projector(nn.Module):
    """Proj and Proj_g of eq. 2. [B, Q, D] -> [B, Q, H]."""

    def __init__(self, config: BioD2CConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.vision_hidden_size, config.vision_hidden_size)
        self.linear2 = nn.Linear(config.vision_hidden_size, config.text_config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class Gate(nn.Module):
    """X_v|t = Proj(X_v) + tanh(β) · Proj_g(X_vt) (eq. 2); β is one learned number."""

    def __init__(self, config: BioD2CConfig) -> None:
        super().__init__()
        self.gate_init = config.gate_init
        # one dimension, not none: DeepSpeed sends parameters as bytes, a view that torch lacks for a 0-dim tensor
        self.beta = nn.Parameter(torch.empty(1))

    def forward(self, projected: Tensor, projected_fused: Tensor) -> Tensor:
        return projected + self.beta.tanh() * projected_fused


class FeatureLevelInteractionOutput(NamedTuple):
    """`conditioned` = X_v|t and `projected` = Proj(X_v), [B, Q, H]; `attentions` = (grid pass, multi-scale pass)."""

    conditioned: Tensor
    projected: Tensor
    attentions: tuple[Tensor, ...] | None


class FeatureLevelInteraction(nn.Module):
    """The image conditioned on the question (section 3.1): all that is new between vision encoder and language model.

    The same decoder runs twice: Q learned queries over the N² grid cells give what eq. 2 calls Proj(X_v) its Q rows,
    and the question X_t over the M multi-scale cells gives X_vt (eq. 1). The first pass is the same for every question
    of an image, so it runs once an image.
    """

    def __init__(self, config: BioD2CConfig) -> None:
        super().__init__()
        self.use_fusion, self.num_scales = config.use_fusion, config.num_scales
        self.position_embedding = config.image_position_embedding
        self.query_embed = nn.Parameter(torch.empty(config.num_visual_tokens, config.vision_hidden_size))
        self.decoder = FusionDecoder(config)
        self.proj = Projector(config)
        if config.use_fusion:  # built only where they are used, so that DDP meets no idle parameter in the ablation
            self.text_encoder = TextEncoderMLP(config)
            self.mfe = MultiScaleFeatureEnhancement(config.num_scales)
            self.proj_gate = Projector(config)
            self.gate = Gate(config)

    def forward(
        self,
        image_grid: Tensor,
        image_index: Tensor | None = None,
        question_embeds: Tensor | None = None,
        question_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> FeatureLevelInteractionOutput:
        """image_grid [I, D, N, N], image_index [B] (None: row b asks image b), question_embeds [B, Q, H]."""
        dtype = self.query_embed.dtype  # a frozen encoder and language model may be held in fewer bits than what trains
        image_grid = image_grid.to(dtype)
        scales = [2**s for s in range(self.num_scales)]
        cells = image_grid.flatten(2).transpose(1, 2)  # [I, N², D]
        queries = self.query_embed.expand(len(cells), -1, -1)
        visual, grid_attention = self.decoder(
            queries, cells, self._positions(image_grid, image_grid.shape[-1:]), None, output_attentions
        )
        projected = _pick(self.proj(visual), image_index)  # [B, Q, H]
        attentions = None if grid_attention is None else (_pick(grid_attention, image_index),)
        if not self.use_fusion:
            return FeatureLevelInteractionOutput(projected, projected, attentions)
        assert question_embeds is not None  # `_interact` has said so
        text = self.text_encoder(question_embeds.to(dtype), question_mask)  # X_t [B, Q, D]
        multiscale = _pick(self.mfe(image_grid), image_index)  # X'_v [B, M, D]
        fused, multiscale_attention = self.decoder(
            text, multiscale, self._positions(image_grid, scales), question_mask, output_attentions
        )
        conditioned = self.gate(projected, self.proj_gate(fused))
        if attentions is None or multiscale_attention is None:
            return FeatureLevelInteractionOutput(conditioned, projected, None)
        return FeatureLevelInteractionOutput(conditioned, projected, (*attentions, multiscale_attention))

    def _positions(self, like: Tensor, sides: Sequence[int]) -> Tensor | None:
        if self.position_embedding == "none":
            return None
        return torch.cat([sine_positions(side, like.shape[1], like) for side in sides])


def sine_positions(side: int, width: int, like: Tensor) -> Tensor:
    """DETR's 2-D sine positions of the centres of side × side cells, row-major: [side², width], y in the first half."""
    centres = (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) / side * 2 * torch.pi
    frequencies = 10000.0 ** (-torch.arange(width // 4, device=like.device) / (width // 4))
    angles = centres[:, None] * frequencies  # [side, width / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, width / 2]
    grid = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], dim=-1)
    return F.pad(grid.flatten(0, 1), (0, width - grid.shape[-1])).to(like.dtype)


def _pick(per_image: Tensor, image_index: Tensor | None) -> Tensor:
    if image_index is None:
        return per_image
    return per_image[image_index.clamp(min=0)]  # a row without an image has -1; what it picks is never used


# --------------------------------------------------------------------------------------------- semantic loss (eq. 3, 4)


def semantic_distribution(
    features: Tensor,
    queue_embeds: Tensor,
    *,
    position_mask: Tensor | None = None,
    queue_mask: Tensor | None = None,
    temperature: float,
    similarity: str = "tokenwise",
) -> Tensor:
    """log p over the queue (eq. 3), [B, k]: how near features [B, Q, H] are to each text of queue_embeds [B, k, Q, H].

    position_mask [B, Q] and queue_mask [B, k, Q] are True where there is a token (None: everywhere). "tokenwise"
    averages the cosines at the positions that both have; "pooled" takes the cosine of the means over each one's own. A
    text without any token is absent: its log p is the most negative number, so that a row of absent texts makes no NaN,
    here or in the gradient.
    """
    # float32 at least, under autocast too: a softmax at τ = 0.1 would leave bfloat16 no digits
    dtype = torch.promote_types(features.dtype, torch.float32)
    features, queue_embeds = features.to(dtype), queue_embeds.to(dtype)
    if position_mask is None:
        position_mask = features.new_ones(features.shape[:2], dtype=torch.bool)
    if queue_mask is None:
        queue_mask = features.new_ones(queue_embeds.shape[:3], dtype=torch.bool)
    if similarity == "pooled":
        pooled, texts = _masked_mean(features, position_mask), _masked_mean(queue_embeds, queue_mask)
        similarities = F.cosine_similarity(pooled[:, None], texts, dim=-1)  # [B, k]
    else:
        with torch.autocast(features.device.type, enabled=False):
            dots = torch.einsum("bqh,bkqh->bkq", features, queue_embeds)
        norms = features.norm(dim=-1).clamp(min=1e-12)[:, None] * queue_embeds.norm(dim=-1).clamp(min=1e-12)
        similarities = _masked_mean((dots / norms)[..., None], position_mask[:, None] & queue_mask).squeeze(-1)
    absent = ~queue_mask.any(-1)
    return (similarities / temperature).masked_fill(absent, torch.finfo(dtype).min).log_softmax(-1)


def semantic_loss(
    image_features: Tensor,
    question_embeds: Tensor,
    queue_embeds: Tensor,
    *,
    question_mask: Tensor | None = None,
    queue_mask: Tensor | None = None,
    temperature: float,
    divergence: str = "v_t",
    similarity: str = "tokenwise",
    num_items: Tensor | int | None = None,
) -> Tensor:
    """KL divergence between what the image and what the question mean, each as a distribution over the queue (eq. 4).

    Args:
        image_features: X_v|t, [B, Q, H].
        question_embeds: ε of the question, [B, Q, H]; with the queue it is the target, and gets no gradient.
        queue_embeds: ε of the k queue texts, [B, k, Q, H].
        question_mask: [B, Q], True where the question has a token (None: everywhere).
        queue_mask: [B, k, Q], True where a text has a token; a text without any is absent (None: all present).
        temperature: τ of eq. 3.
        divergence: "v_t" is KL(p(v)||p(t)) (the paper), "t_v" is KL(p(t)||p(v)).
        similarity: "tokenwise" or "pooled", see `semantic_distribution`.
        num_items: rows with a queue in the whole (accumulated, distributed) batch; None: those of this one.

    Returns:
        Scalar: the sum over the rows that have a queue, divided by `num_items`. 0 if none has.
    """
    question_embeds, queue_embeds = question_embeds.detach(), queue_embeds.detach()
    distribution = partial(
        semantic_distribution,
        queue_embeds=queue_embeds,
        queue_mask=queue_mask,
        temperature=temperature,
        similarity=similarity,
    )
    # token by token, both read the question's positions; pooled, every one of the image's rows is real
    image_mask = question_mask if similarity == "tokenwise" else None
    log_v = distribution(image_features, position_mask=image_mask)
    log_t = distribution(question_embeds, position_mask=question_mask)
    log_from, log_to = (log_v, log_t) if divergence == "v_t" else (log_t, log_v)
    terms = log_from.exp() * (log_from - log_to)  # [B, k]
    rows: Tensor | int = len(terms)
    if queue_mask is not None:
        present = queue_mask.any(-1)
        terms, rows = terms.masked_fill(~present, 0.0), present.any(-1).sum()
    return terms.sum() / torch.as_tensor(rows if num_items is None else num_items).clamp(min=1)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [..., Q, H] over the positions where mask [..., Q] is True."""
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(-2) / weights.sum(-2).clamp(min=1)


# --------------------------------------------------------------------------------------------------------------- BioD2C


@dataclass
class BioD2COutput(ModelOutput):
    """Output of `BioD2CForConditionalGeneration`.

    loss: λ·L_sem + L_nll (eq. 5), where labels are given. nll_loss, semantic_loss: its parts (semantic_loss is None
    without a queue or with λ = 0). logits: [B, L, vocabulary]; in training only the columns that predict a label.
    image_hidden_states: X_v|t [B, Q, H]. fusion_attentions: (grid pass [B, layers, heads, Q, N²], multi-scale pass
    [B, layers, heads, Q, M]). hidden_states and attentions are the language model's.
    """

    loss: Tensor | None = None
    nll_loss: Tensor | None = None
    semantic_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    image_hidden_states: Tensor | None = None
    fusion_attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BioD2CForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """BioD2C: answers a question about an image (paper Fig. 2)."""

    config: BioD2CConfig
    config_class = BioD2CConfig
    input_modalities = ("image", "text")
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch, so that accumulation does not change the loss
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["BioD2CVisionModel", "FeatureLevelInteraction"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(
        self,
        config: BioD2CConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        config.check()
        self.vision_model = vision_model or _vision_model_from_config(config.vision_config)
        kind, channels = type(self.vision_model).__name__, getattr(self.vision_model, "channels", [None])[-1]
        if channels != config.vision_hidden_size:
            raise ValueError(
                f"vision_config: its hidden_size is {config.vision_hidden_size}, but {kind} gives {channels}; "
                "must be a BioD2CVisionModel or a transformers backbone, and its last stage"
            )
        self.fusion = FeatureLevelInteraction(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def from_components(
        cls,
        vision: PreTrainedModel | str | Path,
        language_model: PreTrainedModel | str | Path,
        dtype: torch.dtype | str = "auto",
        **config: Any,
    ) -> "BioD2CForConditionalGeneration":
        """Join a vision encoder and a causal language model; what lies between them starts untrained.

        Args:
            vision: a `BioD2CVisionModel`, a transformers backbone, or the folder of one saved as safetensors
                (`biod2c convert pmc-clip FILE FOLDER` makes PMC-CLIP's).
            language_model: a causal language model, or its folder or Hub name.
            dtype: what a language model that is loaded here is held in (default: what it was saved in).
            config: fields of `BioD2CConfig`; `image_token_id` must be the processor's.
        """
        if not isinstance(vision, PreTrainedModel):
            vision = _load_vision_model(vision)
        if not isinstance(language_model, PreTrainedModel):
            folder = language_model
            language_model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            _refuse_wrong_weights(folder, {"missing": info["missing_keys"]})
        for module in (*vision.modules(), *language_model.modules()):
            module._is_hf_initialized = True  # else a layer that was put in by hand would be drawn anew
        attention = {part: part.config._attn_implementation for part in (vision, language_model)}
        full_config = BioD2CConfig(vision_config=vision.config, text_config=language_model.config, **config)
        for part, kind in attention.items():  # which a configuration takes away from those it holds
            part.config._attn_implementation = kind
        model = cls(full_config, vision_model=vision, language_model=language_model)
        model.generation_config.update(**language_model.generation_config.to_diff_dict())
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, but a weight that is missing, left over or of another shape is an error, not a warning: a
        decoder with random or fewer layers would answer fluently and wrongly.

        Raises:
            ValueError: naming the keys on which the checkpoint's configuration and weights disagree.
        """
        tolerant = kwargs.pop("ignore_mismatched_sizes", False)
        source, strict = pretrained_model_name_or_path, {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = super().from_pretrained(source, *args, **strict, **kwargs)
        left_over = set(info["unexpected_keys"])
        if not model.config.use_fusion:  # the ablation may start from a full model
            unused = ("fusion.text_encoder.", "fusion.proj_gate.", "fusion.gate.")
            left_over = {key for key in left_over if not key.startswith(unused)}
        misshapen = {f"{key}: {tuple(given)}, not {tuple(wanted)}" for key, given, wanted in info["mismatched_keys"]}
        problems = {"missing": info["missing_keys"], "not in the configuration": left_over}
        _refuse_wrong_weights(source, problems if tolerant else {**problems, "of another shape": misshapen})
        # the old names that it looked for; with them the next save would put the tensors into other shards
        model._weight_conversions = None
        return (model, info) if output_loading_info else model

    @property
    def dtype(self) -> torch.dtype:
        """The language model's: the bulk of the weights, and what `dtype="auto"` loads a saved model in."""
        return self.language_model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def train(self, mode: bool = True) -> "BioD2CForConditionalGeneration":
        """A part without a trainable parameter stays in eval mode: BatchNorm and dropout are part of what is frozen."""
        super().train(mode)
        for part in (self.vision_model, self.fusion, self.language_model):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
                for layer in part.modules():
                    # a layer recomputes its activations only if it is told that it trains; what it holds is not told
                    if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                        layer.training = mode
        return self

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [I, 3, image_size, image_size] -> X_v, [I, D, N, N]: once for all questions of an image."""
        output = self.vision_model(pixel_values.to(self.vision_model.dtype))
        return output.feature_maps[-1] if "feature_maps" in output else output.image_grid

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        question_input_ids: Tensor | None = None,
        question_attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        image_grid: Tensor | None = None,
    ) -> Tensor:
        """X_v|t, [B, Q, H]: the image conditioned on the question (eq. 2). Arguments as in `forward`."""
        question_embeds, question_mask = self._embed_question(question_input_ids, question_attention_mask)
        return self._interact(pixel_values, image_grid, image_index, question_embeds, question_mask).conditioned

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        question_input_ids: Tensor | None = None,
        question_attention_mask: Tensor | None = None,
        queue_input_ids: Tensor | None = None,
        queue_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        image_grid: Tensor | None = None,
        image_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_fusion_attentions: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        num_semantic_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> BioD2COutput:
        """Answer tokens' logits and, with labels, the loss of eq. 5.

        Args:
            input_ids: [B, L], with Q `<image>` placeholders in each row that has an image.
            attention_mask: [B, L], 0 where padding (either side).
            pixel_values: [I, 3, image_size, image_size]. Without it (and without `image_grid`), a text-only pass.
            question_input_ids, question_attention_mask: [B, Q], padded on the right.
            queue_input_ids, queue_attention_mask: [B, k, Q]; an absent text is masked whole.
            labels: [B, L], -100 where nothing is to be predicted.
            image_index: [B], the image that each row asks; -1 for a row without one. Default: row b asks image b.
            image_grid: [I, D, N, N] from `encode_image`, instead of `pixel_values`.
            image_features: [B, Q, H] from `get_image_features`, instead of both (what `generate` passes on).
            logits_to_keep: as in transformers; by default all, but in training only the columns that predict a label.
            output_fusion_attentions: also return where the fusion decoder looked.
            num_items_in_batch: label tokens in the whole accumulated batch; the loss is the sum divided by it.
            num_semantic_items_in_batch: rows with a queue in the whole accumulated batch, likewise.
            kwargs: for the language model.

        Raises:
            ValueError: placeholders, images, `image_index` and question do not fit together; both numbers are named.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids or inputs_embeds: one of them is needed, got neither")
            # the placeholder's id may lie outside the vocabulary, and its embedding is replaced anyway
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(self._is_placeholder(input_ids), 0))
        interaction = None
        question_embeds, question_mask = self._embed_question(question_input_ids, question_attention_mask)
        if pixel_values is not None or image_grid is not None:
            interaction = self._interact(
                pixel_values, image_grid, image_index, question_embeds, question_mask, output_fusion_attentions
            )
            image_features = interaction.conditioned
        if image_features is not None:
            inputs_embeds = self._place_image(inputs_embeds, input_ids, image_features, image_index)
        elif input_ids is not None and input_ids.shape[1] >= self.config.num_visual_tokens:  # no step of decoding
            found = self._is_placeholder(input_ids).sum()
            torch_compilable_check(
                found == 0, lambda: f"input_ids has {found} <image> placeholders, but no image is given"
            )
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # so that padding on the left moves nothing; a mask that covers the cache too is longer than the new tokens
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]

        shifted = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100)  # column c predicts shifted[c]
        if shifted is not None:
            if self.training and isinstance(logits_to_keep, int) and logits_to_keep == 0:
                logits_to_keep = (shifted != -100).any(0).nonzero().squeeze(1)
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            shifted = shifted[:, columns].contiguous()
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

        loss = nll_loss = semantic = None
        if queue_input_ids is not None and interaction is not None and self.config.semantic_loss_weight > 0:
            semantic = self._semantic_loss(
                interaction,
                question_embeds,
                question_mask,
                queue_input_ids,
                queue_attention_mask,
                image_index,
                num_semantic_items_in_batch,
            )
        if labels is not None:
            nll_loss = self.loss_function(
                logits=outputs.logits,
                labels=None,
                shift_labels=shifted,
                vocab_size=outputs.logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
            # eq. 5; always a new tensor, because Trainer scales it in place
            loss = nll_loss + (0 if semantic is None else self.config.semantic_loss_weight * semantic)
        return BioD2COutput(
            loss=loss,
            nll_loss=nll_loss,
            semantic_loss=semantic,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            image_hidden_states=image_features,
            fusion_attentions=None if interaction is None else interaction.attentions,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid: Tensor | None = None,
        question_input_ids: Tensor | None = None,
        question_attention_mask: Tensor | None = None,
        suppress_tokens: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers. The image is encoded and fused once, before beams and returned sequences multiply the
        rows; and the placeholder, which a vocabulary may hold, is never an answer.
        """
        if pixel_values is not None or image_grid is not None:
            kwargs["image_features"] = self.get_image_features(
                pixel_values, question_input_ids, question_attention_mask, kwargs.get("image_index"), image_grid
            )
        suppressed = suppress_tokens or (generation_config or self.generation_config).suppress_tokens or []
        suppressed = [*suppressed, self.config.image_token_id]
        return super().generate(inputs, generation_config, suppress_tokens=suppressed, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict:
        model_inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            model_inputs.pop("image_features", None)  # its placeholders are in the cache already
        return model_inputs

    def _embed_question(self, ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if ids is None else self._embed(ids, mask)

    def _embed(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """ε of token ids [..., Q] -> [..., Q, H] and their mask as booleans (None: the padding is read as text)."""
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"question or queue: ids of shape {list(ids.shape)} with a mask of shape {list(mask.shape)}; must agree"
            )
        return self.get_input_embeddings()(ids), mask.bool() if mask is not None and self.config.mask_padding else None

    def _interact(
        self,
        pixel_values: Tensor | None,
        image_grid: Tensor | None,
        image_index: Tensor | None,
        question_embeds: Tensor | None,
        question_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> FeatureLevelInteractionOutput:
        if self.config.use_fusion:
            expected = self.config.num_question_tokens
            if question_embeds is None or question_embeds.shape[1] != expected:
                got = "none" if question_embeds is None else f"{question_embeds.shape[1]} tokens"
                raise ValueError(f"question_input_ids: an image needs its question, [B, {expected}], got {got}")
        if image_grid is None:
            if pixel_values is None:
                raise ValueError("pixel_values or image_grid: one of them is needed, got neither")
            image_grid = self.encode_image(pixel_values)
        images, rows = len(image_grid), None if question_embeds is None else len(question_embeds)
        if image_index is None and rows is not None and rows != images:
            raise ValueError(f"{images} images for {rows} rows: say with image_index which image each row asks")
        if image_index is not None:
            if rows is not None and rows != len(image_index):
                raise ValueError(f"image_index names the images of {len(image_index)} rows, there are {rows} questions")
            torch_compilable_check(
                image_index.max() < images, lambda: f"image_index asks image {image_index.max()}, there are {images}"
            )
        return self.fusion(image_grid, image_index, question_embeds, question_mask, output_attentions)

    def _is_placeholder(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.image_token_id

    def _place_image(
        self, inputs_embeds: Tensor, input_ids: Tensor | None, image_features: Tensor, image_index: Tensor | None
    ) -> Tensor:
        """Put the Q rows of X_v|t where the row's Q placeholders stand."""
        if input_ids is None:
            raise ValueError("an image needs input_ids, which say where it stands; got inputs_embeds alone")
        if len(input_ids) != len(image_features):
            raise ValueError(
                f"input_ids has {len(input_ids)} rows, the image features {len(image_features)}: say with image_index "
                "which image each row asks"
            )
        placeholders = self._is_placeholder(input_ids)  # [B, L]
        wanted = torch.full_like(input_ids[:, 0], image_features.shape[1])
        if image_index is not None:
            wanted = wanted.masked_fill(image_index < 0, 0)
        found = placeholders.sum(1)
        torch_compilable_check(
            (found == wanted).all(),
            lambda: f"rows have {found.tolist()} <image> placeholders, their images need {wanted.tolist()}",
        )
        slot = (placeholders.cumsum(1) - 1).clamp(0, image_features.shape[1] - 1)[..., None]
        rows = image_features.to(inputs_embeds).gather(1, slot.expand(-1, -1, image_features.shape[-1]))  # [B, L, H]
        return torch.where(placeholders[..., None], rows, inputs_embeds)

    def _semantic_loss(
        self,
        interaction: FeatureLevelInteractionOutput,
        question_embeds: Tensor | None,
        question_mask: Tensor | None,
        queue_input_ids: Tensor,
        queue_attention_mask: Tensor | None,
        image_index: Tensor | None,
        num_items: Tensor | int | None,
    ) -> Tensor:
        if question_embeds is None:
            raise ValueError(
                "queue_input_ids: a queue is compared with the question, but question_input_ids is missing"
            )
        queue_embeds, queue_mask = self._embed(queue_input_ids, queue_attention_mask)
        if image_index is not None:  # a row without an image has nothing to align
            has_image = (image_index >= 0)[:, None, None].expand_as(queue_input_ids)
            queue_mask = has_image if queue_mask is None else queue_mask & has_image
        config = self.config
        features = interaction.conditioned if config.semantic_features == "fused" else interaction.projected
        return semantic_loss(
            features,
            question_embeds,
            queue_embeds,
            question_mask=question_mask,
            queue_mask=queue_mask,
            temperature=config.semantic_temperature,
            divergence=config.semantic_divergence,
            similarity=config.semantic_similarity,
            num_items=num_items,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DETR's start for the parts between the two encoders, which initialise themselves."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DecoderAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, FeatureLevelInteraction):
            init.normal_(module.query_embed)
        elif isinstance(module, Gate):
            init.constant_(module.beta, module.gate_init)
        else:
            super()._init_weights(module)


def _vision_model_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    if config.model_type == BioD2CVisionConfig.model_type:
        return BioD2CVisionModel(config)
    return AutoBackbone.from_config(config)


def _load_vision_model(folder: str | Path) -> PreTrainedModel:
    fields, _ = PreTrainedConfig.get_config_dict(folder)
    if fields.get("model_type") == BioD2CVisionConfig.model_type:
        model, info = BioD2CVisionModel.from_pretrained(folder, output_loading_info=True)
    else:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):  # only for its class: AutoBackbone.from_pretrained takes no folders
            backbone = type(AutoBackbone.from_config(config))
        model, info = backbone.from_pretrained(folder, config=config, output_loading_info=True)
    # what a classifier's folder has more is not needed
    _refuse_wrong_weights(folder, {"missing": info["missing_keys"]})
    return model


def _refuse_wrong_weights(source: Any, problems: dict[str, set[str]]) -> None:
    found = [f"{len(keys)} {what} (such as {min(keys)})" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"{source}: config.json and the weights disagree: {' and '.join(found)}. "
            "Use the config.json that was saved with these weights"
        )


BioD2CForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["BioD2CForConditionalGeneration", "BioD2CVisionModel"]
