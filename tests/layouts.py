"""Checkpoints whose weights come from a seed, so that only logits need to be kept (see make_layout_logits.py)."""

import json
import zlib
from pathlib import Path

import numpy as np

TOKENS = [(7 * i) % 120 + 4 for i in range(40)]
POSITIONS, ENTRIES = [0, 3, 17, 38, 39], [0, 9, 50, 77, 127]  # of the logits that are kept


def seeded(name: str, shape: list[int]) -> np.ndarray:
    """A weight by its name, large enough that every part of the model matters."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) < 2:
        values = values * 0.2 + ("norm" in name or "ln_" in name) * name.endswith("weight")
    else:
        values = values * (1.0 if "embed" in name or "wte" in name else 1.5 / np.sqrt(np.prod(shape[1:])))
    return np.asarray(values, np.float32)


def write_layout(folder: Path, config: dict, shapes: dict[str, list[int]]) -> Path:
    """config.json and model.safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: seeded(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def documented(table: dict[str, dict]) -> str:
    """The table of layouts in docs/models.md, from gemma_refactored/config_keys.json."""
    lines = ["| layout | against transformers | refused by name |", "| --- | --- | --- |"]
    scalings = ("linear", "dynamic", "yarn", "llama3", "longrope")
    for name, record in table.items():
        verdict = {True: "equal", False: "other numbers: refused", None: "not compared"}[record["agrees"]]
        lost = []
        if record["agrees"]:
            lost += [f"other `{key}`" for key in record["keys"]]
            has_rope = set(scalings) & set(record["rope"])
            lost += [f"{kind} RoPE" for kind in scalings if has_rope and kind not in record["rope"]]
            lost += {"all": [], "usual": ["unusual `layer_types`"], "none": ["`sliding_window`"]}[record["windows"]]
        lines.append(f"| {name} | {verdict} | {', '.join(lost)} |")
    return "\n".join(lines)


if __name__ == "__main__":  # python -m tests.layouts: write it
    from gemma_refactored.config_audit import compared

    path = Path(__file__).parent.parent / "docs" / "models.md"
    before, start, rest = path.read_text().partition("<!-- layouts -->\n")
    after = rest.partition("<!-- end of layouts -->")[2]
    path.write_text(f"{before}{start}{documented(compared())}\n<!-- end of layouts -->{after}")
