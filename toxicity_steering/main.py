"""Steer a model away from toxicity: python -m toxicity_steering.main

Edit the constants, or name model, data and scorer on the command line. The default is the embedded
organism with its own prompts and a word list; for Phi-4-mini:

    python -m toxicity_steering.main --model microsoft/Phi-4-mini-instruct \\
        --dataset real-toxicity-prompts --scorer roberta
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from alignment_artifacts import places
from gemma_refactored.errors import exit_code

NUM_PROMPTS = 50  # challenging, and as many benign ones
NUM_PAIRS = 20
SAMPLES = 5
MAX_TOKENS = 32
TEMPERATURE, TOP_P = 0.7, 0.9
ALPHAS = (-1.0, 0.0, 0.5, 1.0, 1.5)  # and the largest one within MAX_KL at the best layer
LAYERS = None  # all; or for example (4, 8, 12)
LAST_TOKENS = 32
MAX_KL = 0.1
SEED = 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="toxicity_steering.main", description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--model", help="local folder or Hugging Face id (default: the embedded organism)")
    parser.add_argument("--dataset", choices=["organism", "real-toxicity-prompts"], default="organism")
    parser.add_argument("--scorer", default="word-list", help="word-list, roberta, or a classifier's id or folder")
    parser.add_argument("--output-dir", type=Path, help="default: toxicity_results, or one that belongs to --model")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments), "Interrupted; run the same command again to continue.")


def run(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from gemma_refactored.model_loading import DEFAULT_MODEL, device_description, load

    from .activation_steering import FULL, ActivationSteeringExperiment, Config
    from .data import load_organism_prompts, load_real_toxicity_prompts
    from .plots import plot_all
    from .scorers import load_scorer

    is_organism = arguments.dataset == "organism"
    data = load_organism_prompts(NUM_PROMPTS) if is_organism else load_real_toxicity_prompts(NUM_PROMPTS, SEED)
    scorer = load_scorer(arguments.scorer)
    loaded = load(places.find_model(arguments.model or DEFAULT_MODEL))
    output = arguments.output_dir or places.toxicity_folder(loaded)
    print(f"Model: {loaded.name} ({loaded.num_layers} layers) on {device_description()}")
    print(f"Data: {data.name}, {NUM_PROMPTS} + {NUM_PROMPTS} prompts. Scorer: {scorer.name}.")
    config = Config(
        ALPHAS, LAYERS, NUM_PAIRS, SAMPLES, MAX_TOKENS, TEMPERATURE, TOP_P, LAST_TOKENS, max_kl=MAX_KL, seed=SEED
    )

    def progress(items, what):
        return tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty())

    experiment = ActivationSteeringExperiment(loaded, data, scorer, output, config, progress)
    results = experiment.run()
    plot_all(results, output / "plots")
    print_summary(results)
    print("\n" + places.told("Numbers", output / FULL))
    print(places.told("Plots", output / "plots"))


def print_summary(results: dict) -> None:
    """Mean toxicity by layer and alpha, and the setting of choice, 80 columns wide."""
    alphas = results["experiment"]["config"]["alphas"]
    print("\nMean toxicity of challenging prompts (KL on benign answers, nats a token)")
    alphas = alphas[:5]  # as many as fit
    print("layer " + "".join(f"{f'alpha {alpha:g}':>14}" for alpha in alphas))
    sweep = results["sweep"]
    for layer in dict.fromkeys(record["layer"] for record in sweep.values()):
        cells = [sweep[f"layer {layer}, alpha {alpha:g}"]["steering"] for alpha in alphas]
        print(f"{layer:>5} " + "".join(f"{c['mean_toxicity']:>7.2f} ({c['kl_mean']:.2f})" for c in cells))
    s = results["summary"]

    def described(name: str) -> str:
        low, high = s[name]["mean_toxicity_ci"]
        return f"{s[name]['mean_toxicity']:.2f} [{low:.2f}, {high:.2f}]"

    limit = "" if s["within_kl_limit"] else " No setting stays within the KL limit."
    print(
        "\n"
        + textwrap.fill(
            f"Chosen on half of the challenging prompts: layer {s['layer']}, alpha {s['alpha']:g}. On the other half "
            f"mean toxicity is {described('steered')} against {described('baseline')} unsteered and "
            f"{described('random_direction')} with a random direction of the same norm; KL on benign answers "
            f"{s['kl_mean']:.3f} nats a token, distinct-2 {s['distinct_2_steered']:.2f} against "
            f"{s['distinct_2_baseline']:.2f}. Scorer: {results['experiment']['scorer']}.{limit}",
            78,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
