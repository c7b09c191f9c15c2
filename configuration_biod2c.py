"""Configuration of BioD2C: a vision encoder, a causal language model, and what joins them (paper section 3).

Unusual here: every point where the paper and the authors' released code differ is a field, so that both the paper's
model (the defaults) and the authors' checkpoint (the values that `convert_checkpoint.py` writes) are exactly
expressible. A combination that cannot be built raises ValueError when the configuration is made, not when a tensor
fails to fit.
"""

from typing import Any, ClassVar, Literal, get_args, get_origin

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig


class BioD2CVisionConfig(PreTrainedConfig):
    """PMC-CLIP's ModifiedResNet-50 image encoder (CLIP's ResNet with a three-convolution stem).

    Args:
        layers: bottleneck blocks in each of the four stages.
        width: channels after the stem; stage s has `width * 2**(s + 1)` channels out.
        image_size: side of the square input, in pixels.
        out_stage: the stage whose output is the grid X_v (paper section 3.1). 3 is stride 16: 512 pixels give 32 x 32
            cells of 1024 channels. Later stages are not built.
        attention_pool: build all stages and PMC-CLIP's attention pool too, for the pooled `image_features` that the
            BioVGQ figure filter classifies (paper section 2).
        attention_pool_heads: heads of the attention pool.
        projection_dim: width of the pooled `image_features`.

    Raises:
        ValueError: for an encoder that cannot be built, naming the field, its value and what is allowed.
    """

    model_type = "biod2c_vision"
    base_config_key = "vision_config"

    layers: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    image_size: int = 512
    num_channels: int = 3
    out_stage: int = 3
    attention_pool: bool = False
    attention_pool_heads: int = 32
    projection_dim: int = 768

    def __post_init__(self, **kwargs: Any) -> None:
        self.layers = list(self.layers)
        _check_counts(self, ("width", "image_size", "num_channels", "attention_pool_heads", "projection_dim"))
        if not all(isinstance(blocks, int) and blocks >= 1 for blocks in self.layers):
            raise ValueError(f"vision_config.layers={self.layers}: each stage must have 1 block or more")
        if self.width % 2:
            raise ValueError(f"vision_config.width={self.width}: must be even, since the stem starts with half of it")
        if self.out_stage not in range(1, len(self.layers) + 1):
            raise ValueError(
                f"vision_config.out_stage={self.out_stage}: there are {len(self.layers)} stages "
                f"(layers={self.layers}), so it must be from 1 to {len(self.layers)}"
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"vision_config.image_size={self.image_size}: must be a multiple of {self.stride}, "
                f"the stride of the {'last' if self.attention_pool else 'taken'} stage"
            )
        channels = self.width * 2 ** (len(self.layers) + 1)
        if self.attention_pool and channels % self.attention_pool_heads:
            raise ValueError(
                f"vision_config.attention_pool_heads={self.attention_pool_heads}: must divide the last stage's "
                f"{channels} channels"
            )
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels D of the grid."""
        return self.width * 2 ** (self.out_stage + 1)

    @property
    def stride(self) -> int:
        """Pixels a cell of the deepest stage that is built."""
        return 2 ** ((len(self.layers) if self.attention_pool else self.out_stage) + 1)

    @property
    def grid_size(self) -> int:
        """Cells N along each side of the grid."""
        return self.image_size // 2 ** (self.out_stage + 1)


class BioD2CConfig(PreTrainedConfig):
    """BioD2C: vision encoder + feature-level interaction (Fig. 2) + causal language model + semantic loss.

    Args:
        vision_config: a `BioD2CVisionConfig`, or the configuration of any transformers vision backbone
            (what `AutoBackbone` builds: ResNet, ConvNeXt, DINOv2 ...).
        text_config: the configuration of any causal language model.
        image_token_id: id of the `<image>` placeholder; it may lie outside the language model's vocabulary, since its
            embedding is never looked up.
        num_visual_tokens: Q, how many `<image>` placeholders stand for an image; the decoder's learned queries.
        num_question_tokens: length the question is padded or cut to. Eq. 2 adds its rows to the visual rows, so it must
            equal `num_visual_tokens`.
        num_scales: S of the multi-scale feature enhancement; M = sum of 4**(s-1) cells.
        text_mlp_dim: hidden width of the MLP that makes X_t.
        fusion_layers, fusion_heads, fusion_ffn_dim, fusion_dropout: the fusion decoder (eq. 1).
        use_fusion: False is the ablation "w/o fm": X_v|t = Proj(X_v).
        gate_init: beta at the start (paper 0.2; the authors' code 0.1).
        image_position_embedding: "none", or "sine" to add 2-D sine positions to the decoder's keys (not in the paper).
        semantic_loss_weight: lambda of eq. 5: 0 in stage 1, 1 in stage 2.
        semantic_queue_size: k, texts in a row's queue (paper 30; the authors' code 10).
        semantic_temperature: tau of eq. 3 (not in the paper; the authors' value).
        semantic_features: "fused" aligns X_v|t (paper); "projected" aligns Proj(X_v) (the authors' code).
        semantic_divergence: "v_t" is KL(p(v)||p(t)) (paper eq. 4); "t_v" is KL(p(t)||p(v)) (the authors' code).
        semantic_similarity: "tokenwise": cosine at the same token position, averaged over positions; "pooled": cosine
            of the means over real tokens.
        mask_padding: padding is never read and absent queue members do not count. False reads padding ids as text, as
            the authors' code does.

    Raises:
        ValueError: for a combination that cannot be built, naming the field, its value and what is allowed.
    """

    model_type = "biod2c"
    sub_configs: ClassVar = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # Trainer.evaluate gathers every other tensor of the model's output
    keys_to_ignore_at_inference: ClassVar = [
        "nll_loss",
        "semantic_loss",
        "past_key_values",
        "image_hidden_states",
        "fusion_attentions",
        "hidden_states",
        "attentions",
    ]

    vision_config: Any = None  # a configuration or its dictionary; afterwards always a configuration
    text_config: Any = None
    image_token_id: int = 32000
    num_visual_tokens: int = 32
    num_question_tokens: int = 32
    num_scales: int = 6
    text_mlp_dim: int = 2048
    fusion_layers: int = 12
    fusion_heads: int = 8
    fusion_ffn_dim: int = 1024
    fusion_dropout: float = 0.1
    use_fusion: bool = True
    gate_init: float = 0.2
    image_position_embedding: Literal["none", "sine"] = "none"
    semantic_loss_weight: float = 1.0
    semantic_queue_size: int = 30
    semantic_temperature: float = 0.1
    semantic_features: Literal["fused", "projected"] = "fused"
    semantic_divergence: Literal["v_t", "t_v"] = "v_t"
    semantic_similarity: Literal["tokenwise", "pooled"] = "tokenwise"
    mask_padding: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _as_config(self.vision_config, default="biod2c_vision")
        self.text_config = _as_config(self.text_config, default="llama")
        # the language model ties its own embeddings; transformers only looks at this level when it loads them
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        # whichever Auto class a checkpoint is opened with, it is this model; the files lie beside config.json
        model = "modeling_biod2c.BioD2CForConditionalGeneration"
        self.auto_map = {
            "AutoConfig": "configuration_biod2c.BioD2CConfig",
            "AutoModel": model,
            "AutoModelForCausalLM": model,
            "AutoModelForImageTextToText": model,
        }
        self.check()

    @property
    def vision_hidden_size(self) -> int:
        """D, the channels of the vision encoder's grid: the width of the fusion decoder."""
        stages = getattr(self.vision_config, "hidden_sizes", None)
        if stages:  # of a backbone that may give an earlier stage than its last; its stage 0 is the stem
            return stages[self.vision_config.out_indices[-1] - 1]
        return getattr(self.vision_config, "hidden_size", 0)

    def to_dict(self) -> dict[str, Any]:
        """The dtype is said once, at the top: transformers fills it into the parts only on loading, so a file saved
        again would differ.
        """
        fields = super().to_dict()
        for part in self.sub_configs:
            fields[part].pop("dtype", None)
        return fields

    def check(self) -> None:
        """Raise ValueError for what cannot be built; the model calls it again, since fields may be set later."""
        for name, annotation in type(self).__annotations__.items():
            if get_origin(annotation) is Literal and getattr(self, name) not in get_args(annotation):
                allowed = ", ".join(repr(value) for value in get_args(annotation))
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {allowed}")
        fusion = ("text_mlp_dim", "fusion_layers", "fusion_heads", "fusion_ffn_dim")
        _check_counts(self, ("num_visual_tokens", "num_scales", *fusion, "semantic_queue_size"))
        if self.num_question_tokens != self.num_visual_tokens:
            raise ValueError(
                f"num_question_tokens={self.num_question_tokens}: must equal num_visual_tokens="
                f"{self.num_visual_tokens}, because the gate (paper eq. 2) adds the question's rows to the image's rows"
            )
        for part, width, allowed in (
            ("vision_config", self.vision_hidden_size, "biod2c_vision or a vision backbone"),
            ("text_config", getattr(self.text_config, "hidden_size", 0), "a causal language model"),
        ):
            if not width:
                model_type = getattr(self, part).model_type
                raise ValueError(f"{part}.model_type={model_type!r}: has no hidden_size; must be {allowed}")
        if self.vision_hidden_size % self.fusion_heads:
            raise ValueError(
                f"fusion_heads={self.fusion_heads}: must divide the vision encoder's width {self.vision_hidden_size}"
            )
        if self.semantic_temperature <= 0:
            raise ValueError(f"semantic_temperature={self.semantic_temperature}: must be above 0")
        if self.semantic_loss_weight < 0:
            raise ValueError(f"semantic_loss_weight={self.semantic_loss_weight}: must be 0 or more")
        if not 0 <= self.fusion_dropout < 1:
            raise ValueError(f"fusion_dropout={self.fusion_dropout}: must be at least 0 and below 1")
        grid_size = getattr(self.vision_config, "grid_size", None)
        if self.use_fusion and grid_size is not None and 2 ** (self.num_scales - 1) > grid_size:
            raise ValueError(
                f"num_scales={self.num_scales}: its finest scale cuts each side into {2 ** (self.num_scales - 1)} "
                f"blocks, but the grid has {grid_size} cells a side; at most {grid_size.bit_length()} scales fit"
            )


def _check_counts(config: PreTrainedConfig, names: tuple[str, ...]) -> None:
    prefix = f"{config.base_config_key}." if config.base_config_key else ""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{prefix}{name}={value!r}: must be a whole number, 1 or more")


def _as_config(config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config or {})
    model_type = fields.pop("model_type", default)
    # not in transformers' own mapping, and registering it there would leave a trace in every process that imports this
    # file
    if model_type == BioD2CVisionConfig.model_type:
        return BioD2CVisionConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)


BioD2CConfig.register_for_auto_class()

__all__ = ["BioD2CConfig", "BioD2CVisionConfig"]
