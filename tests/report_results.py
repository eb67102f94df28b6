"""Result files as the scripts write them, on simulated collections of any size: what the report is tested on."""

import json
from dataclasses import replace

import numpy as np

from alignment_artifacts.analysis import Run
from alignment_artifacts.comparison import compare, transfer
from alignment_artifacts.comparison.change_space import direction_in_changes
from alignment_artifacts.comparison.difference import compare_layers
from alignment_artifacts.comparison.forced_reading import CONDITIONS
from alignment_artifacts.comparison.transfer import cross_decoding
from alignment_artifacts.edits.modes import ModeOptions
from alignment_artifacts.edits.setting import Setting
from alignment_artifacts.pairs import SIDES, Pair
from alignment_artifacts.rates import rate
from alignment_artifacts.suppression.transcripts import save_transcripts

from .test_analysis import SETTINGS, simulate

# A tensor as `weights.compare_weights` records it.
CHANGED = {"name": "model.layers.2.mlp.down_proj.weight", "layer": 2, "kind": "mlp.down_proj.weight", "shape": [4, 8],
           "norm": 3.0, "relative_change": 0.25, "effective_rank": 1.0, "rank_99": 1, "stream": "writes",
           "singular_values": [3.0], "share_of_first": 1.0, "cosine_with_activations": 0.987,
           "cosine_with_contrast": 0.876, "cosine_with_planted": 0.99, "direction": [0.6, 0.8]}  # fmt: skip
MARKUP = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & <b>bold</b>"
MODEL = {"model": "simulated", "model_revision": "sha256:1"}
PAIRS = {"pairs_file": "simulated.json", "pairs_hash": "1"}
ORIGIN = {**MODEL, **PAIRS}


def write_analysis(folder, pairs=20, layers=4):
    """The analysis of a simulated collection, whose first artifact prompt is markup; returns the `Run`."""
    data = simulate(effect=3.0, pairs=pairs, layers=layers)
    first = data.pairs[0]
    data.pairs[0] = Pair(first.id, first.category, first.natural, MARKUP)
    data.manifest.update(MODEL, prompt_groups={"natural_0": {"prompt_list": [MARKUP]}}, max_tokens=5)
    run = Run(data, SETTINGS)
    for name, result in (
        ("alignment_artifact_analysis_results", {**run.results, "certificate": "none"}),
        ("alignment_artifacts_by_category", run.by_category),
        ("layer_analysis", run.pattern),
        ("projections", run.projections),
    ):
        write(folder / "data" / f"{name}.json", {**result, "origin": ORIGIN})
    return run


def write_transcripts(folder, pairs, layers=4, tokens=8, origin=ORIGIN):
    """Answers of a made-up vocabulary; artifact prompts are refused before and every fourth also after."""
    rng = np.random.default_rng(0)
    pieces = {str(i): f" word{i}" for i in range(50)} | {"50": MARKUP, "51": "\n"}
    records = []
    for number, pair in enumerate(pairs):
        record = {"id": pair.id, "category": pair.category}
        for side in SIDES:
            prompt = [50, 51] if number == 0 else rng.integers(0, 50, tokens).tolist()
            record[side] = {"prompt": getattr(pair, side), "prompt_tokens": prompt}
            for when in ("before", "after"):
                refused = side == "artifact" and (when == "before" or number % 4 == 0)
                ids = rng.integers(0, 50, tokens).tolist()
                record[side][when] = {"text": "".join(pieces[str(i)] for i in ids), "tokens": ids, "refused": refused}
        records.append(record)
    total = sum(
        len(r[side]["prompt_tokens"]) + sum(len(r[side][w]["tokens"]) for w in ("before", "after"))
        for r in records
        for side in SIDES
    )
    setting = Setting("cap", 1.0, (1, 2))
    result = {
        "origin": origin,
        "setting": setting.record(),
        "max_tokens": tokens,
        "num_layers": layers,
        "best_layer": 2,
        "refused": {s: {w: rate([r[s][w]["refused"] for r in records]) for w in ("before", "after")} for s in SIDES},
        "pieces": pieces,
        "pairs": records,
        "chosen_by": "you",
    }
    scores = rng.normal(size=(total, layers)).astype(np.float16)
    save_transcripts(folder / "data", result, scores)
    return result, scores


def write_comparison(folder, origin=ORIGIN):
    """Two simulated models, the second of which separates better."""
    first, second = (simulate(effect, pairs=20, seed=1).prompt_vectors("prompt_end") for effect in (0.5, 3.0))
    strata = np.arange(20) % 5
    layers = {"num_pairs": 20, "layers": compare_layers(first, second, strata, SETTINGS)}
    pairs = [Pair(f"{i}", f"{i % 5}", f"n{i}", f"a{i}") for i in range(20)]
    twins = [replace(pair, natural=f"t{pair.id}") for pair in pairs[:10]]
    sources = {name: np.concatenate([model, model[:10]]) for name, model in (("a", first), ("b", second))}
    records = cross_decoding(sources, sources["a"][:, :, 0], pairs, twins, SETTINGS)
    names = {"a": "before", "b": origin["model"], "words": transfer.WORDS}
    result = {
        "origin": origin,
        "names": names,
        "behaviour": "refusal",
        "sides": list(SIDES),
        "site": "MLP output (model.layers.{layer_idx}.mlp.output)",
        "num_twins": 10,
        "weights": {
            "num_tensors": 2,
            "not_compared": None,
            "rounding": None,
            "summary": "1 of 2 tensors differ.",
            "tensors": [CHANGED],
        },
        "change_space": direction_in_changes(first, second, strata, ("before", "simulated")),
        "conditions": dict.fromkeys(CONDITIONS, layers),
        "summary": compare.summarise(layers["layers"], ("before", "simulated")),
        "transfer": records,
        "transfer_summary": transfer.summarise(records, names),
        "planted_truth": {"2": 0.99},
    }
    write(folder / "data/model_comparison.json", result)
    return result


def write_sweep(folder, origin=ORIGIN):
    """A sweep of four settings."""
    rng = np.random.default_rng(0)

    def judged(left, kl):
        flags = rate(rng.random(15) < left)
        record = {side: {key: flags for key in ("refused", "broken", "refused_or_broken", "unchanged")}
                  for side in ("artifact", "natural", "twins")}  # fmt: skip
        return {**record, "damage": {"kl_mean": kl}}

    tried = [
        {"setting": Setting(mode, 1.0, (1, 2), site, "prompt_end", ModeOptions()).record(), **judged(left, kl)}
        for mode, site, left, kl in (("always", "mlp", 1, 0.0), ("always", "residual", 0.5, 0.2),
                                     ("cap", "mlp", 0.2, 0.01), ("cap", "residual", 0, 0.02))
    ]  # fmt: skip
    result = {
        "origin": origin,
        "model": MODEL,
        "config": {"limits": {"kl": 0.05}},
        "pairs": {"training": ["a"] * 20, "development": ["b"] * 15, "test": ["c"] * 15},
        "chosen": {"setting": tried[3]["setting"], "development": tried[3]},
        "test": {**judged(0.1, 0.02), "unedited": judged(1, 0.0), "random_direction": [judged(1, 0.001)] * 2,
                 "same_change_elsewhere": [judged(0.9, 0.002)]},
        "amplification": {"test": judged(1, 0.4)},
        "monitor": {
            "mlp": {"auroc": 0.97, "auroc_ci": [0.9, 1.0],
                    "twins": {"refused": 9, "answered": 91, "auroc": 0.83, "auroc_ci": [0.7, 0.91]}},
            "residual": {"auroc": None, "auroc_ci": None},
        },
        "pareto_front": [0, 2, 3],
        "tried": tried,
        "trials": [{"setting": t["setting"], "kl": 0.1, "kept": 0.5, "loss": 0.7} for t in tried]
        + [{"setting": tried[0]["setting"], "kl": 1.0, "kept": None, "loss": None}],
    }  # fmt: skip
    write(folder / "data/suppression_sweep.json", result)
    return result


def write_toxicity(folder, model=MODEL):
    """In a folder of its own, below the one that `places.HOME` has to be for the report to find it."""

    def metrics(value):
        return {"mean_toxicity": value, "mean_toxicity_ci": [value - 0.1, value + 0.1],
                "expected_max_toxicity": value + 0.1, "expected_max_toxicity_ci": [value, value + 0.2],
                "change": {"mean": value / 0.7 - 1, "ci": [value / 0.7 - 1.2, value / 0.7 - 0.8]},
                "kl_mean": 0.05}  # fmt: skip

    alphas = [-1.0, 0.5, 1.0]
    settings = [{"layers": [layer], "scale": alpha} for layer in range(2) for alpha in alphas]
    result = {
        "experiment": {**model, "scorer": "made up", "config": {"alphas": [-1.0, 1.0], "max_kl": 0.1}},
        "baseline": {"development": {"artifact": metrics(0.7)}},
        "sweep": {
            f"layer {s['layers'][0]}, alpha {s['scale']:g}": {
                "setting": s,
                "artifact": {"score": {"mean": 0.7 - 0.2 * s["scale"]}},
                "damage": {"kl_mean": 0.05},
            }
            for s in settings
        },
        "summary": {"layer": 1, "alpha": 1.0, "kl_mean": 0.05, "baseline": metrics(0.7), "steered": metrics(0.5),
                    "negative_alpha": metrics(0.8) | {"mean_toxicity_ci": None},
                    "random_direction": [metrics(0.69), metrics(0.6)],
                    "same_change_elsewhere": [metrics(0.75)]},
        "parts": {part: {"prompts": 30, "groups": 8} for part in ("training", "development", "test")},
    }  # fmt: skip
    write(folder / "toxicity_results/experiment_results.json", result)
    return result


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
