"""Configuration of the MammoDINO vision transformer."""

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


@strict
class MammoDinoConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`MammoDinoModel`]. The fields are those of `Dinov2WithRegistersConfig`, so that one checkpoint
    serves both, with the defaults of a ViT-B/14 for one gray channel.

    Args:
        hidden_size (`int`, defaults to 768): Width D of the encoder.
        num_hidden_layers (`int`, defaults to 12): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 12): Heads of each attention; must divide `hidden_size`.
        mlp_ratio (`int`, defaults to 4): Hidden size of the MLP over `hidden_size`.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout on the embeddings.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout on the attention weights.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal initialization.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every LayerNorm.
        image_size (`int` or pair, defaults to 518): Side in pixels for which position embeddings are stored. Other
            sizes, also not square, are interpolated.
        patch_size (`int` or pair, defaults to 14): Side of a patch in pixels.
        num_channels (`int`, defaults to 1): Input channels.
        qkv_bias (`bool`, defaults to `True`): Bias of the query, key and value projections.
        layerscale_value (`float`, defaults to 1e-5): Initial LayerScale; 1e-5 is DINOv2's training value.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth in training, on a random subset of the batch.
        use_swiglu_ffn (`bool`, defaults to `False`): SwiGLU instead of the MLP.
        num_register_tokens (`int`, defaults to 4): Register tokens R.
        interpolate_antialias (`bool`, defaults to `True`), interpolate_offset (`float`, defaults to 0.0): How stored
            position embeddings reach other sizes, in the words of facebookresearch/dinov2. The defaults are those of
            its register variants and of `Dinov2WithRegistersModel`; its plain variants use `False` and 0.1.
        tissue_threshold (`float`, defaults to 0.0): With `tissue_mask`, a patch whose breast fraction is at most this
            is background: it is dropped before the first block.
        out_features (`list[str]`), out_indices (`list[int]`): Stages that a backbone returns, of `"stem"`,
            `"stage1"`, ...; the last by default.
        apply_layernorm (`bool`, defaults to `True`): Final LayerNorm on a backbone's feature maps.
        reshape_hidden_states (`bool`, defaults to `True`): A backbone's feature maps are (B, D, h, w).
    """

    model_type = "mammodino"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 518
    patch_size: int | list[int] | tuple[int, int] = 14
    num_channels: int = 1
    qkv_bias: bool = True
    layerscale_value: float | int = 1e-5
    drop_path_rate: float | int = 0.0
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 4
    interpolate_antialias: bool = True
    interpolate_offset: float | int = 0.0
    tissue_threshold: float | int = 0.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        # One folder serves every Auto class through remote code; save_pretrained alone would list only one.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_mammodino.MammoDinoConfig",
                "AutoModel": "modeling_mammodino.MammoDinoModel",
                "AutoBackbone": "modeling_mammodino.MammoDinoBackbone",
                "AutoModelForImageClassification": "modeling_mammodino.MammoDinoForImageClassification",
            },
        )
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )


__all__ = ["MammoDinoConfig"]
