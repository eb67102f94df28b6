"""Golden values for the parity tests: tiny random checkpoints run by transformers.

    pip install torch==2.13.0 transformers==5.23.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
    python tests/make_golden_values.py

For each layout it writes tests/golden/NAME/: the checkpoint (config.json, model.safetensors)
and golden.safetensors with the prompts, the logits and what each site of every layer holds,
computed in float32 with eager attention on a CPU. NAME_4bit is the same layout with wider layers,
made by mlx-lm's convert; its golden values are those of the weights it stands for. The tests need
neither torch nor transformers.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "golden"
LENGTH, WINDOW, VOCABULARY = 21, 6, 97  # the prompts are several sliding windows long

NARROW, WIDE = (
    dict(hidden_size=32, intermediate_size=48, head_dim=12),
    dict(hidden_size=64, intermediate_size=96, head_dim=16),
)
SMALL = dict(
    **NARROW, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=1,
)  # fmt: skip


def gemma3(**changes):
    settings = dict(num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=10, sliding_window_pattern=3)
    config = transformers.Gemma3TextConfig(**SMALL, **{**settings, **changes})
    return transformers.Gemma3ForCausalLM(config)


def gemma1():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SMALL, num_hidden_layers=3))


def gemma2():
    config = transformers.Gemma2Config(
        **SMALL, num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=10,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def gemma3_multimodal():
    """The layout of the 4B, 12B and 27B checkpoints: a text tower with scaled RoPE beside a vision tower."""
    text = dict(
        **SMALL, num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=10, sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def phi():
    """Phi-4-mini's layout: partial rotary and longrope. The factors change beyond 16 positions, so that
    the two golden prompts (21 tokens) are long and their first 12 tokens, run alone, are short."""
    generator = torch.Generator().manual_seed(2)
    pairs = SMALL["hidden_size"] // 4 * 3 // 4 // 2
    factors = {name: (1 + torch.rand(pairs, generator=generator) * 3).tolist() for name in ("short", "long")}
    config = transformers.Phi3Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"}, num_hidden_layers=3, sliding_window=None,
        tie_word_embeddings=True, rope_theta=10000.0, partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": factors["short"], "long_factor": factors["long"]},
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


MODELS = {"gemma1": gemma1, "gemma2": gemma2, "gemma3": gemma3, "gemma3_multimodal": gemma3_multimodal, "phi": phi}


def randomise(model) -> None:
    """Weights large enough that every part matters, norm weights included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name else 0.25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def record_sites(model, tokens) -> dict:
    """Outputs of the modules that our sites are named after, plus the attention weights."""
    seen, handles = {}, []

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    decoder = getattr(model.model, "language_model", model.model)
    for i, layer in enumerate(decoder.layers):
        name = f"model.layers.{i}"
        for path, module in ((".output", layer), (".self_attn.output", layer.self_attn), (".mlp.output", layer.mlp)):
            handles.append(module.register_forward_hook(keep(name + path)))
        before = lambda key: lambda module, inputs: seen.__setitem__(key, inputs[0])  # noqa: E731
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(before(name + ".mlp.neurons")))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(before(name + ".self_attn.heads")))
        handles.append(layer.input_layernorm.register_forward_pre_hook(before(name + ".resid_pre")))
        middle = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        handles.append(middle.register_forward_pre_hook(before(name + ".resid_mid")))
    result = model(tokens, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    for i, weights in enumerate(result.attentions):
        seen[f"model.layers.{i}.self_attn.weights"] = weights
    seen["logits"] = result.logits
    return {name: value.detach().float().contiguous().clone() for name, value in seen.items()}


def save_golden(model, folder: Path) -> None:
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    golden = {"tokens": tokens.int(), **record_sites(model, tokens)}
    golden["logits_of_first_12"] = record_sites(model, tokens[:, :12])["logits"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "mlx-lm": mlx_lm.__version__}
    save_file(golden, folder / "golden.safetensors", metadata={"versions": json.dumps(versions)})
    print(folder.name, versions, sum(p.numel() for p in model.parameters()), "parameters")


def convert_to_4_bit(model, folder: Path) -> None:
    """mlx-lm's convert, as the checkpoints of mlx-community were made; then the golden values of what it wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as original:
        model.save_pretrained(original)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # convert wants one
            shutil.copy(FOLDER.parent.parent / "model_organism" / "aligned" / name, original)
        config = json.loads((Path(original) / "config.json").read_text())
        # mlx-lm looks for a multimodal model's vocabulary here; the released ones have its default.
        (Path(original) / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY}))
        mlx_lm.convert(original, str(folder), quantize=True, q_bits=4, q_group_size=32)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    expanded = mlx_lm.utils.dequantize_model(mlx_lm.utils.load_model(folder)[0])
    expanded.set_dtype(mx.float32)
    weights = {name: torch.from_numpy(numpy.array(value)) for name, value in tree_flatten(expanded.parameters())}
    prefix = "model.language_model." if any(name.startswith("language_model.") for name in weights) else "model."
    names = {name: name.removeprefix("language_model.").replace("model.", prefix, 1) for name in weights}
    missing, unexpected = model.load_state_dict({names[name]: value for name, value in weights.items()}, strict=False)
    unfilled = [
        name for name in missing if "vision" not in name and "projector" not in name and name != "lm_head.weight"
    ]
    assert not unexpected and not unfilled, (unexpected, unfilled)
    model.tie_weights()
    save_golden(model, folder)


def main() -> None:
    for name in sys.argv[1:] or [*MODELS, *(f"{name}_4bit" for name in MODELS)]:
        torch.manual_seed(0)
        is_4_bit = name.endswith("_4bit")
        # Groups of 32 weights share a scale, so every width must be a multiple of 32.
        SMALL.update(WIDE if is_4_bit else NARROW)
        model = MODELS[name.removesuffix("_4bit")]().float().eval()
        model.set_attn_implementation("eager")
        randomise(model)
        folder = FOLDER / name
        if is_4_bit:
            convert_to_4_bit(model, folder)
            continue
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_golden(model, folder)


if __name__ == "__main__":
    main()
