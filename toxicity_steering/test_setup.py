"""Is everything installed for the toxicity experiment? python -m toxicity_steering.test_setup

Lists what works and what is missing, with the remedy. The exit code is 0 if the offline experiment (embedded
model) can run; what the Phi-4-mini experiment needs in addition is listed, but is not required.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, `python toxicity_steering/test_setup.py`: the repository is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import importlib.util
from collections.abc import Callable

from gemma_refactored.errors import UserError, exit_code


def check_machine() -> str:
    import mlx.core as mx

    from gemma_refactored.model_loading import device_description

    total = mx.random.normal((64, 64), key=mx.random.key(0)).sum().item()
    return f"MLX computes on {device_description()} (a sum of random numbers: {total:.2f})"


def check_model() -> str:
    from alignment_artifacts.default_model import DEFAULT_MODEL
    from gemma_refactored.model_loading import load

    loaded = load(DEFAULT_MODEL)
    return f"{loaded.name}, {loaded.num_layers} layers"


def check_data() -> str:
    from toxicity_steering.data import load_organism_prompts

    data = load_organism_prompts(90)
    return f"{len(data.challenging)} + {len(data.benign)} prompts about {len(set(data.groups))} people"


def check_scorer() -> str:
    from toxicity_steering.scorers import rude_words

    rude, kind = (rude_words("", text) for text in ("You stupid, useless fool.", "You are a great help."))
    return f"word list: rude {rude:.2f}, kind {kind:.2f}"


def check_extra() -> str:
    """What only the Phi-4-mini experiment needs."""
    missing = [name for name in ("torch", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{", ".join(missing)} not installed; for Phi-4-mini: pip install -e ".[toxicity]"')
    return "torch and datasets for RealToxicityPrompts and its scorer"


CHECKS: dict[str, tuple[Callable[[], str], bool]] = {
    "machine": (check_machine, True),
    "model": (check_model, True),
    "data": (check_data, True),
    "scorer": (check_scorer, True),
    "extra": (check_extra, False),
}


def main() -> int:
    return exit_code(run)


def run() -> int:
    failed = False
    for name, (check, is_needed) in CHECKS.items():
        try:
            print(f"ok       {name:<8} {check()}")
        except (UserError, ImportError) as error:
            failed = failed or is_needed
            print(f"{'MISSING' if is_needed else 'optional'} {name:<8} {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
