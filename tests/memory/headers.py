"""Headers of production models, from the sizes of their papers and repositories: no weights, no downloads."""

import json
import math
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def linear(name: str, out: int, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def embedders(width: int, **inputs: int) -> Shapes:
    """Two linears for each name, from so many numbers."""
    found: Shapes = {}
    for name, size in inputs.items():
        found |= linear(f"{name}.in_layer", width, size) | linear(f"{name}.out_layer", width, width)
    return found


def flux(doubles: int = 19, singles: int = 38, d: int = 3072) -> Shapes:
    """FLUX.1-dev, names of Black Forest Labs."""
    found = linear("img_in", d, 64) | linear("txt_in", d, 4096)
    found |= embedders(d, time_in=256, guidance_in=256, vector_in=768)
    for i in range(doubles):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            found |= linear(f"{at}_mod.lin", 6 * d, d) | linear(f"{at}_attn.qkv", 3 * d, d)
            found |= linear(f"{at}_attn.proj", d, d) | linear(f"{at}_mlp.0", 4 * d, d)
            found |= linear(f"{at}_mlp.2", d, 4 * d)
            found |= {f"{at}_attn.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    for i in range(singles):
        at = f"single_blocks.{i}"
        found |= linear(f"{at}.modulation.lin", 3 * d, d) | linear(f"{at}.linear1", 7 * d, d)
        found |= linear(f"{at}.linear2", d, 5 * d)
        found |= {f"{at}.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    return found | linear("final_layer.adaLN_modulation.1", 2 * d, d) | linear("final_layer.linear", 64, d)


def flux_diffusers(doubles: int = 19, singles: int = 38, d: int = 3072) -> Shapes:
    """The same, names of diffusers."""
    found = linear("x_embedder", d, 64) | linear("context_embedder", d, 4096)
    for name, size in (("timestep", 256), ("guidance", 256), ("text", 768)):
        at = f"time_text_embed.{name}_embedder"
        found |= linear(f"{at}.linear_1", d, size) | linear(f"{at}.linear_2", d, d)
    for i in range(doubles):
        at = f"transformer_blocks.{i}"
        for name in JOINT:
            found |= linear(f"{at}.attn.{name}", d, d)
        found |= linear(f"{at}.norm1.linear", 6 * d, d) | linear(f"{at}.norm1_context.linear", 6 * d, d)
        for ff in ("ff", "ff_context"):
            found |= linear(f"{at}.{ff}.net.0.proj", 4 * d, d) | linear(f"{at}.{ff}.net.2", d, 4 * d)
        found |= {f"{at}.attn.norm{n}.weight": (128,) for n in ("_q", "_k", "_added_q", "_added_k")}
    for i in range(singles):
        at = f"single_transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v"):
            found |= linear(f"{at}.attn.{name}", d, d)
        found |= linear(f"{at}.norm.linear", 3 * d, d) | linear(f"{at}.proj_mlp", 4 * d, d)
        found |= linear(f"{at}.proj_out", d, 5 * d)
        found |= {f"{at}.attn.norm_{n}.weight": (128,) for n in "qk"}
    return found | linear("norm_out.linear", 2 * d, d) | linear("proj_out", 64, d)


def wan(layers: int = 40, d: int = 5120, ffn: int = 13824) -> Shapes:
    """Wan 2.1 text to video, original names."""
    found: Shapes = {"patch_embedding.weight": (d, 16, 1, 2, 2), "patch_embedding.bias": (d,)}
    found |= linear("text_embedding.0", d, 4096) | linear("text_embedding.2", d, d)
    found |= linear("time_embedding.0", d, 256) | linear("time_embedding.2", d, d)
    found |= linear("time_projection.1", 6 * d, d) | linear("head.head", 64, d)
    found |= {"head.modulation": (1, 2, d)}
    for i in range(layers):
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                found |= linear(f"blocks.{i}.{attention}.{name}", d, d)
            found |= {f"blocks.{i}.{attention}.norm_{n}.weight": (d,) for n in "qk"}
        found |= linear(f"blocks.{i}.ffn.0", ffn, d) | linear(f"blocks.{i}.ffn.2", d, ffn)
        found |= {f"blocks.{i}.modulation": (1, 6, d), f"blocks.{i}.norm3.weight": (d,)}
        found |= {f"blocks.{i}.norm3.bias": (d,)}
    return found


def qwen(layers: int = 60, d: int = 3072) -> Shapes:
    """Qwen-Image, names of diffusers."""
    found = linear("img_in", d, 64) | linear("txt_in", d, 3584) | {"txt_norm.weight": (3584,)}
    at = "time_text_embed.timestep_embedder"
    found |= linear(f"{at}.linear_1", d, 256) | linear(f"{at}.linear_2", d, d)
    for i in range(layers):
        at = f"transformer_blocks.{i}"
        for name in JOINT:
            found |= linear(f"{at}.attn.{name}", d, d)
        for stream in ("img", "txt"):
            found |= linear(f"{at}.{stream}_mod.1", 6 * d, d)
            found |= linear(f"{at}.{stream}_mlp.net.0.proj", 4 * d, d)
            found |= linear(f"{at}.{stream}_mlp.net.2", d, 4 * d)
        found |= {f"{at}.attn.norm{n}.weight": (128,) for n in ("_q", "_k", "_added_q", "_added_k")}
    return found | linear("norm_out.linear", 2 * d, d) | linear("proj_out", 64, d)


def z_image(layers: int = 30, d: int = 3840) -> Shapes:
    """Z-Image, names of diffusers."""
    found = linear("all_x_embedder.2-1", d, 64) | {"x_pad_token": (1, d), "cap_pad_token": (1, d)}
    found |= {"cap_embedder.0.weight": (2560,)} | linear("cap_embedder.1", d, 2560)
    found |= linear("t_embedder.mlp.0", 1024, 256) | linear("t_embedder.mlp.2", 256, 1024)
    for name, count in (("noise_refiner", 2), ("context_refiner", 2), ("layers", layers)):
        for i in range(count):
            at = f"{name}.{i}"
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                found |= linear(f"{at}.attention.{part}", d, d, bias=False)
            for part, shape in (("w1", (10240, d)), ("w2", (d, 10240)), ("w3", (10240, d))):
                found |= linear(f"{at}.feed_forward.{part}", *shape, bias=False)
            found |= {f"{at}.attention.norm_{n}.weight": (128,) for n in "qk"}
            found |= {f"{at}.{a}_norm{n}.weight": (d,) for a in ("attention", "ffn") for n in (1, 2)}
            if name != "context_refiner":
                found |= linear(f"{at}.adaLN_modulation.0", 4 * d, 256)
    at = "all_final_layer.2-1"
    return found | linear(f"{at}.linear", 64, d) | linear(f"{at}.adaLN_modulation.1", d, 256)


def sd35_medium(layers: int = 24, d: int = 1536) -> Shapes:
    """SD3.5-medium, names of Stability AI: a second attention over the image in the first 13 layers."""
    found: Shapes = {"x_embedder.proj.weight": (d, 16, 2, 2), "pos_embed": (1, 384**2, d)}
    found |= linear("context_embedder", d, 4096) | linear("t_embedder.mlp.0", d, 256)
    found |= linear("t_embedder.mlp.2", d, d) | linear("y_embedder.mlp.0", d, 2048)
    found |= linear("y_embedder.mlp.2", d, d) | linear("final_layer.linear", 64, d)
    for i in range(layers):
        for stream in ("x_block", "context_block"):
            at, dual, last = f"joint_blocks.{i}.{stream}", stream[0] == "x" and i < 13, i == layers - 1
            chunks = 9 if dual else 2 if last and stream[0] == "c" else 6
            found |= linear(f"{at}.adaLN_modulation.1", chunks * d, d) | linear(f"{at}.attn.qkv", 3 * d, d)
            if dual:
                found |= linear(f"{at}.attn2.qkv", 3 * d, d) | linear(f"{at}.attn2.proj", d, d)
            if chunks > 2:
                found |= linear(f"{at}.attn.proj", d, d)
                found |= linear(f"{at}.mlp.fc1", 4 * d, d) | linear(f"{at}.mlp.fc2", d, 4 * d)
    return found


def hidream(doubles: int = 16, singles: int = 32, d: int = 2560) -> Shapes:
    """HiDream-I1, names of diffusers: two of four experts see a token."""
    found = linear("x_embedder.proj", d, 64) | linear("final_layer.linear", 64, d)
    for i in range(49):
        found |= linear(f"caption_projection.{i}.linear", d, 4096, bias=False)
    for name, count in (("double_stream_blocks", doubles), ("single_stream_blocks", singles)):
        for i in range(count):
            at, double = f"{name}.{i}.block", name[0] == "d"
            found |= linear(f"{at}.adaLN_modulation.1", (12 if double else 6) * d, d)
            for part in ("to_q", "to_k", "to_v", "to_out"):
                for stream in ("", "_t") if double else ("",):
                    found |= linear(f"{at}.attn1.{part}{stream}", d, d)
            experts = {f"ff_i.experts.{e}": 6912 for e in range(4)} | {"ff_i.shared_experts": 3584}
            for expert, hidden in (experts | ({"ff_t": 6912} if double else {})).items():
                for part, shape in (("w1", (hidden, d)), ("w2", (d, hidden)), ("w3", (hidden, d))):
                    found |= linear(f"{at}.{expert}.{part}", *shape, bias=False)
            found |= linear(f"{at}.ff_i.gate", 4, d, bias=False)
    return found


def write_header(path: Path, shapes: Shapes, whole: bool = True) -> Path:
    """A safetensors file of bfloat16 tensors; with `whole` of its full length, all hole."""
    end, header = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        offsets = [end, end := end + 2 * math.prod(shape)]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end if whole else 8 + len(encoded))
    return path
