"""Models as their libraries come, small and with random weights: what `benchmarks/libraries.py` trains.

The libraries are imported when a case is built, so that one that is missing costs only its own cases.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, BATCH = 1000, 4
Built = tuple[nn.Module, dict[str, Any]]  # the model, and the arguments of a call by name


@dataclass(frozen=True)
class Case:
    library: str
    build: Callable[[], Built]

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.library) is None

    def made(self) -> Built:
        torch.manual_seed(0)
        return self.build()


def loss_of(result: Any) -> Tensor:
    """The loss that a model returns, else the mean squares of all that it returns."""
    if getattr(result, "loss", None) is not None:
        return result.loss
    return torch.stack([leaf.square().mean() for leaf in floats(result)]).sum()


def floats(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
        return
    for item in result.values() if isinstance(result, Mapping) else result:
        yield from floats(item)


def tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, length))


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(BATCH, channels, size, size)


# -- transformers ------------------------------------------------------------------------------------------------------


def hugging(model: str, config: str, settings: dict[str, Any], arguments: Callable[[], dict[str, Any]]) -> Case:
    def build() -> Built:
        library: Any = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**settings)), arguments()

    return Case("transformers", build)


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
VISION = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


def predicted(**more: Any) -> Callable[[], dict[str, Any]]:
    """Tokens that are their own labels."""

    def arguments() -> dict[str, Any]:
        read = tokens(64)
        return {"input_ids": read, "labels": read.clone(), **more}

    return arguments


def causal(name: str, **settings: Any) -> Case:
    return hugging(f"{name}ForCausalLM", f"{name}Config", {**TEXT, **settings}, predicted())


def masked(name: str, **settings: Any) -> Case:
    attention = torch.ones(BATCH, 64, dtype=torch.long)
    attention[1:, 50:] = 0  # padding
    return hugging(f"{name}ForMaskedLM", f"{name}Config", {**TEXT, **settings}, predicted(attention_mask=attention))


def classifying(name: str, size: int, **settings: Any) -> Case:
    def arguments() -> dict[str, Any]:
        return {"pixel_values": images(size), "labels": torch.randint(10, (BATCH,))}

    return hugging(f"{name}ForImageClassification", f"{name}Config", {"num_labels": 10, **settings}, arguments)


HALVES = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
HALVES |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
HALVES |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128)

TRANSFORMERS = {
    "gpt2": hugging(
        *("GPT2LMHeadModel", "GPT2Config"),
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
        predicted(),
    ),
    "llama": causal("Llama", **GROUPED),
    "mistral": causal("Mistral", **GROUPED, sliding_window=32),
    "qwen3": causal("Qwen3", **GROUPED, head_dim=16),
    "gemma3": hugging(*("Gemma3ForCausalLM", "Gemma3TextConfig"), {**TEXT, **GROUPED, "head_dim": 16}, predicted()),
    "phi3": causal("Phi3", **GROUPED),
    "gpt_neox": causal("GPTNeoX"),
    "opt": causal("OPT", ffn_dim=128, max_position_embeddings=128, word_embed_proj_dim=64),
    "bloom": causal("Bloom", n_layer=4, n_head=4),
    "mixtral": causal("Mixtral", **GROUPED, num_local_experts=4),
    "mamba": causal("Mamba", num_hidden_layers=3, state_size=8),
    "bert": masked("Bert"),
    "roberta": masked("Roberta", max_position_embeddings=130),
    "modernbert": masked("ModernBert", cls_token_id=1, sep_token_id=2),
    "deberta": masked("DebertaV2", relative_attention=True, pos_att_type="p2c|c2p", position_buckets=16),
    "t5": hugging(
        *("T5ForConditionalGeneration", "T5Config"),
        {**TEXT, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0},
        predicted(),
    ),
    "bart": hugging(
        *("BartForConditionalGeneration", "BartConfig"),
        {"vocab_size": VOCABULARY, "d_model": 64, "max_position_embeddings": 128, **HALVES},
        predicted(),
    ),
    "whisper": hugging(
        *("WhisperForConditionalGeneration", "WhisperConfig"),
        {**TEXT, "d_model": 64, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64, **HALVES}
        | {"decoder_start_token_id": 1},
        lambda: {"input_features": torch.randn(BATCH, 16, 100), "labels": tokens(32)},
    ),
    "vit": classifying("ViT", 64, **VISION, image_size=64, patch_size=8),
    "dinov2": classifying("Dinov2", 56, **VISION, image_size=56, patch_size=14),
    "swin": classifying(
        "Swin", 64, image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "segformer": classifying("Segformer", 64, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1]),
    "clip": hugging(
        *("CLIPModel", "CLIPConfig"),
        {
            "text_config": {**TEXT, "max_position_embeddings": 32},
            "vision_config": {**VISION, "image_size": 32, "patch_size": 8},
            "projection_dim": 32,
        },
        lambda: {"input_ids": tokens(16), "pixel_values": images(32), "return_loss": True},
    ),
}


# -- timm, diffusers ---------------------------------------------------------------------------------------------------


def timm(name: str, size: int) -> Case:
    def build() -> Built:
        return importlib.import_module("timm").create_model(name, num_classes=10), {"x": images(size)}

    return Case("timm", build)


SMALL = """resnet50 efficientnet_b0 convnext_atto mobilenetv3_small_100 regnetx_002 nfnet_l0 poolformer_s12
    hrnet_w18_small densenet121 inception_next_tiny ghostnet_100 res2net50d dla34 edgenext_xx_small repvgg_a0
    vovnet39a""".split()
LARGE = """mixer_s32_224 vit_tiny_patch16_224 swin_tiny_patch4_window7_224 coatnet_0_224 maxvit_tiny_rw_224
    eva02_tiny_patch14_224 levit_128s pit_ti_224 beit_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224
    xception41 efficientvit_b0 davit_tiny focalnet_tiny_srf mvitv2_tiny fastvit_t8""".split()
TIMM = {name: timm(name, 96) for name in SMALL} | {name: timm(name, 224) for name in LARGE}


def diffusers(model: str, settings: dict[str, Any], arguments: Callable[[], dict[str, Any]]) -> Case:
    def build() -> Built:
        return getattr(importlib.import_module("diffusers"), model)(**settings), arguments()

    return Case("diffusers", build)


WIDTHS: dict[str, Any] = {"block_out_channels": (32, 64), "norm_num_groups": 8}


def steps() -> Tensor:
    return torch.randint(10, (BATCH,))


DIFFUSERS = {
    "unet": diffusers(
        "UNet2DModel",
        {
            **WIDTHS,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda: {"sample": images(16), "timestep": steps()},
    ),
    "unet_with_text": diffusers(
        "UNet2DConditionModel",
        {
            **WIDTHS,
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        lambda: {"sample": images(16, 4), "timestep": steps(), "encoder_hidden_states": torch.randn(BATCH, 6, 32)},
    ),
    "autoencoder": diffusers(
        "AutoencoderKL",
        {
            **WIDTHS,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        lambda: {"sample": images(32)},
    ),
    "dit": diffusers(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "num_layers": 4,
            "sample_size": 16,
            "num_embeds_ada_norm": 10,
        },
        lambda: {"hidden_states": images(16, 4), "timestep": steps(), "class_labels": steps()},
    ),
}

# -- torch_geometric ---------------------------------------------------------------------------------------------------


def geometric(name: str, options: dict[str, Any]) -> Case:
    def build() -> Built:
        models = importlib.import_module("torch_geometric.nn.models")
        nodes, width = 2000, 64
        arguments = {"x": torch.randn(nodes, width), "edge_index": torch.randint(nodes, (2, 8 * nodes))}
        return getattr(models, name)(width, width, 6, **options), arguments

    return Case("torch_geometric", build)


GEOMETRIC = {
    "gcn": geometric("GCN", {}),  # of how many edges there are after self-loops are added, only the data tell
    "gat": geometric("GAT", {"heads": 4}),
    "sage": geometric("GraphSAGE", {}),
    "gin": geometric("GIN", {"norm": "batch_norm"}),
}

LIBRARIES = {"transformers": TRANSFORMERS, "timm": TIMM, "diffusers": DIFFUSERS, "torch_geometric": GEOMETRIC}
CASES = {f"{library}/{name}": case for library, cases in LIBRARIES.items() for name, case in cases.items()}
