"""Golden values for adapters: tiny random ones in PEFT's layout, run by PEFT on checkpoints of tests/golden.

    pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    python -m tests.make_adapter_values

For each case it writes tests/golden/adapters/NAME/: the adapter as PEFT saves it, and golden.safetensors with
tokens and logits, float32 on a CPU. Case "untied" brings its own checkpoint, in base/. The tests need neither
torch nor PEFT.
"""

import json
import shutil
import sys

import peft
import torch
import transformers
from safetensors.torch import save_file

from .make_golden_values import FOLDER, LENGTH, SMALL, VOCABULARY, randomise

ADAPTERS = FOLDER / "adapters"
ATTENTION = ["q_proj", "v_proj", "o_proj"]
CASES = {
    "plain": ("gemma3", dict(r=4, lora_alpha=6, target_modules=[*ATTENTION, "down_proj"])),
    "patterns": (
        "gemma2",
        dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "k_proj", "up_proj"],
             rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
             alpha_pattern={"model.layers.2.self_attn.q_proj": 9}),
    ),
    "dora": ("gemma1", dict(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "gate_proj", "down_proj"])),
    "some_layers": (
        "phi", dict(r=2, lora_alpha=4, target_modules=["qkv_proj", "o_proj"], layers_to_transform=[0, 2]),
    ),
    "multimodal": ("gemma3_multimodal", dict(r=2, lora_alpha=4, target_modules=r".*language_model.*\.(q|down)_proj")),
    "untied": (
        None, dict(r=3, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"],
                   bias="lora_only"),
    ),
    "conv1d": ("gpt2", dict(r=3, lora_alpha=5, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)),
}  # fmt: skip


def untied():
    """Llama's layout with biases and an unembedding of its own."""
    settings = {name: value for name, value in SMALL.items() if name != "head_dim"}
    config = transformers.LlamaConfig(
        **settings, num_hidden_layers=3, tie_word_embeddings=False, attention_bias=True, rms_norm_eps=1e-6
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=2, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def base_model(name: str, base: str | None):
    folder = FOLDER / str(base)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if base is None or base == "gpt2":
        folder = ADAPTERS / name / "base"
        model = (untied if base is None else gpt2)().float().eval()
        randomise(model)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        return model
    kind = (
        transformers.AutoModelForImageTextToText if base.endswith("multimodal") else transformers.AutoModelForCausalLM
    )
    return kind.from_pretrained(folder, **options).eval()


def make(name: str) -> None:
    base, settings = CASES[name]
    folder = ADAPTERS / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = base_model(name, base)
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(tokens).logits
        tuned = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(2)
        for parameter in (parameter for parameter in tuned.parameters() if parameter.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        after = tuned(tokens).logits
    tuned.peft_config["default"].base_model_name_or_path = f"tests/golden/{base}"
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    libraries = {"torch": torch, "transformers": transformers, "peft": peft}
    versions = {library: module.__version__ for library, module in libraries.items()}
    golden = {"tokens": tokens.int(), "logits": after.float().contiguous()}
    save_file(golden, folder / "golden.safetensors", metadata={"versions": json.dumps(versions)})
    moved = float((after - before).abs().max() / before.abs().max())
    print(f"{name}: logits move by {moved:.2f} of the largest", versions)


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
