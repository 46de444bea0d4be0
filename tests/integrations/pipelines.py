"""Small pipelines of diffusers with random weights: every component real, nothing downloaded."""

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

__all__ = ["PIPELINES", "image"]

WORDS = 90


def tokenizer(length: int = 16) -> transformers.PreTrainedTokenizerFast:
    """A letter is a token; ends with </s>, the largest number, where CLIP reads its pooled state."""
    vocabulary = {"<pad>": 0, "<unk>": 1} | {chr(97 + i): 2 + i for i in range(26)} | {"</s>": WORDS - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", WORDS - 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=length,
    )


def clip(width: int, projected: bool = False) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        eos_token_id=WORDS - 1,
        bos_token_id=0,
        pad_token_id=0,
    )
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return cls(config).eval()


def t5(width: int, cls: str = "T5") -> torch.nn.Module:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{cls}Config")(vocab_size=WORDS, **sizes)
    return getattr(transformers, f"{cls}EncoderModel")(config).eval()


def llama(width: int, layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def vae(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.05,
        scaling_factor=1.1,
    ).eval()


def scheduler(**options) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """No layer left at zero, norms that are not the identity."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[1:].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def flux() -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return diffusers.FluxPipeline(
        scheduler(use_dynamic_shifting=True),
        vae(4),
        clip(24),
        tokenizer(),
        t5(32),
        tokenizer(24),
        randomised(transformer),
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=48,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    encoders = (clip(24, True), tokenizer(), clip(24, True), tokenizer(), t5(64), tokenizer(24))
    return diffusers.StableDiffusion3Pipeline(
        randomised(transformer), scheduler(shift=3.0), vae(8), *encoders
    )


def wan() -> diffusers.WanPipeline:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    )
    video_vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    return diffusers.WanPipeline(
        tokenizer=tokenizer(24),
        text_encoder=t5(32, "UMT5"),
        vae=video_vae,
        scheduler=scheduler(shift=3.0),
        transformer=randomised(transformer),
    )


def hidream() -> diffusers.HiDreamImagePipeline:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_channels=[32, 32],
        text_emb_dim=48,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1, 1],
    )
    return diffusers.HiDreamImagePipeline(
        scheduler(shift=3.0),
        vae(4),
        clip(24, True),
        tokenizer(),
        clip(24, True),
        tokenizer(),
        t5(32),
        tokenizer(24),
        llama(32, 2),
        tokenizer(24),
        randomised(transformer),
    )


SIZE = {"height": 32, "width": 32, "max_sequence_length": 16}
PIPELINES = {
    "flux": (flux, SIZE | {"guidance_scale": 3.5}),
    "sd3": (sd3, SIZE | {"guidance_scale": 4.0, "negative_prompt": "blur"}),
    "wan": (wan, SIZE | {"guidance_scale": 4.0, "negative_prompt": "blur", "num_frames": 5}),
    "hidream": (hidream, SIZE | {"guidance_scale": 4.0, "negative_prompt": "blur"}),
}


@torch.no_grad()
def image(pipe: diffusers.DiffusionPipeline, options: dict, seed: int = 0, **more) -> torch.Tensor:
    """Four steps; pictures or frames in 0 .. 1."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    result = pipe(
        "a red heart",
        num_inference_steps=4,
        generator=generator,
        output_type="pt",
        return_dict=False,
        **options,
        **more,
    )
    return torch.as_tensor(result[0]).float()
