"""Steer a model away from toxicity: python -m toxicity_steering.main

Edit the constants, or name model, data and scorer on the command line. The default is the embedded
organism with its own prompts and a word list; for Phi-4-mini:

    python -m toxicity_steering.main --model microsoft/Phi-4-mini-instruct \\
        --dataset real-toxicity-prompts --scorer roberta
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, `python toxicity_steering/main.py`: the repository is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from alignment_artifacts import places
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.environment import unused
from alignment_artifacts.formatting import interval, number
from gemma_refactored.configuration import Chat
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.settings import Between, from_constants
from toxicity_steering.config import Config

MODEL = DEFAULT_MODEL  # the embedded organism; a local folder or Hugging Face id
ADAPTER = None  # a LoRA adapter to add to it: a folder of mlx-lm or PEFT
DATASET = "organism"  # or "real-toxicity-prompts"
SCORER = "word-list"  # or "roberta", or a classifier's id or folder
OUTPUT_DIR = None  # None: toxicity_results, or a folder that belongs to another model

NUM_PROMPTS = 90  # challenging, and as many benign ones
NUM_PAIRS = 20
SAMPLES = 5
MAX_TOKENS = 32
TEMPERATURE, TOP_P = 0.7, 0.9
ALPHAS = (-1.0, 0.5, 1.0, 1.25, 1.5, 2.0)
LAYERS = None  # all; or for example (4, 8, 12)
RANDOM_CONTROLS = 3
LAST_TOKENS = 32
MAX_KL = 0.1
SEED = 0
SYSTEM_PROMPT = None  # the system message before each prompt
CHAT_TEMPLATE = None  # the name of one of several, or a file
CHAT_TEMPLATE_ARGS = None  # variables of the template as JSON: '{"enable_thinking": false}'


@dataclass(frozen=True)
class Constants:
    model: str
    """local folder, GGUF file or Hugging Face id; by default the embedded organism"""
    adapter: str | None
    """LoRA adapter of mlx-lm or PEFT to add to it: folder or Hugging Face id"""
    dataset: Literal["organism", "real-toxicity-prompts"]
    """where the prompts come from"""
    scorer: str
    """word-list, roberta, or a classifier's id or folder"""
    output_dir: Path | None
    """where results and plots go; None: a folder that belongs to the model"""
    num_prompts: Annotated[int, Between(2)]
    """challenging prompts, and as many benign ones, divided into training, development and test"""
    experiment: Config = Config()
    chat: Chat = Chat()


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(
        lambda: run(from_constants(Constants, globals(), argv, also={"MODEL": "MODEL_NAME"})),
        "Interrupted; run the same command again to continue.",
    )


def run(constants: Constants) -> None:
    from gemma_refactored.model_loading import device_description, load
    from toxicity_steering.activation_steering import FULL, run_experiment
    from toxicity_steering.data import load_organism_prompts, load_real_toxicity_prompts
    from toxicity_steering.plots import plot_all
    from toxicity_steering.scorers import load_scorer

    count, config = constants.num_prompts, constants.experiment
    is_organism = constants.dataset == "organism"
    data = load_organism_prompts(count) if is_organism else load_real_toxicity_prompts(count, config.seed)
    scorer = load_scorer(constants.scorer)
    if not (data.chat_mode or constants.chat.is_default):
        raise UserError(
            f"{data.name} is continued as plain text, which has no place for a system prompt or a chat template."
        )
    loaded = load(
        places.find_model(constants.model),
        chat=constants.chat,
        adapter=constants.adapter and places.find_model(constants.adapter),
    )
    output = constants.output_dir or places.toxicity_folder(loaded)
    print(f"Model: {loaded.name} ({loaded.num_layers} layers) on {device_description()}")
    print(f"Data: {data.name}, {count} + {count} prompts. Scorer: {scorer.name}.")
    for sentence in unused({"PAIRS": "this experiment has its own prompts", "SITE": "the residual stream is steered"}):
        print(sentence)

    results = run_experiment(loaded, data, scorer, output, config, quiet=False)
    with places.written_together(output) as folder:
        plot_all(results, folder / "plots")
    print_summary(results)
    print("\n" + places.told("Numbers", output / FULL))
    print(places.told("Plots", output / "plots"))


def print_summary(results: dict) -> None:
    """Mean toxicity by layer and alpha, and the setting of choice, 80 columns wide."""
    from alignment_artifacts.figures.data import alpha_table
    from alignment_artifacts.summary import toxicity_rows

    (layers, alphas, toxicity), (_, _, kl) = (alpha_table(results, name) for name in ("toxicity", "kl"))
    print("\nOn the prompts to choose on: mean toxicity (KL, nats per token) by alpha")
    at_every_layer = results["experiment"]["config"]["alphas"]
    columns = [i for i, alpha in enumerate(alphas) if alpha in at_every_layer][-6:]  # as many as fit
    print("layer " + "".join(f"{alphas[i]:>12g}" for i in columns))
    for layer, *row in zip(layers, toxicity.tolist(), kl.tolist(), strict=True):
        cells = ("{} ({})".format(*(number(values[i]) for values in row)) for i in columns)
        print(f"{layer:>5} " + "".join(f"{cell:>12}" for cell in cells))
    s, parts = results["summary"], results["parts"]
    development, test, text = parts["development"], parts["test"], textwrap.TextWrapper(78).fill
    split = (
        f"Layer {s['layer']}, alpha {s['alpha']:g} is chosen on {development['prompts']} challenging prompts of "
        f"{development['groups']} groups and tested on {test['prompts']} of {test['groups']} other groups. A group is "
        "who or what prompts are about; vectors come from others again. 95% intervals are over groups; controls have "
        "their least and most."
    )
    print("\n" + text(split))
    print(f"{'':<40} {'mean toxicity':<18} change")
    for label, mean, _, change in toxicity_rows(s):
        print(f"{label:<40} {mean:<18} {change}".rstrip())
    limit = "" if s["within_kl_limit"] else " No setting stays within the KL limit."
    cost = (
        f"KL on benign answers {number(s['kl_mean'], 3)} {interval(s['kl_mean_ci'], 3)} nats per token (the limit of "
        f"{results['experiment']['config']['max_kl']:g} is for the choice); distinct-2 "
        f"{number(s['steered']['distinct_2'])} against {number(s['baseline']['distinct_2'])}. Scorer: "
        f"{results['experiment']['scorer']}.{limit}"
    )
    print("\n" + text(cost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
