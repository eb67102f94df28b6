"""What different programs would call "Cohen's d" on simulated collections whose true d is known.

50 pairs, 20 correlated steps per prompt, 256 dimensions. Prompts of a class vary with standard
deviation 1 along the true axis and 0.3 along every other, steps around their prompt with half of
that. Writes benchmarks/simulated_cohens_d.json:  python benchmarks/simulated_cohens_d.py
"""

import sys
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment_artifacts import separation as st
from alignment_artifacts.intervals import Uncertainty, robust_sd
from gemma_refactored.files import write_json

PAIRS, STEPS, HIDDEN, REPEATS = 50, 20, 256, 20
RESULTS = Path(__file__).with_suffix(".json")


def simulate(rng: np.random.Generator, d: float) -> tuple[np.ndarray, np.ndarray]:
    """Natural and artifact steps [pairs, steps, hidden]; the prompts' true d along axis 0 is `d`."""
    scale = np.r_[1.0, np.full(HIDDEN - 1, 0.3)]
    prompts = rng.normal(size=(2, PAIRS, 1, HIDDEN)) * scale
    prompts[1, ..., 0] += d
    return tuple(prompts + rng.normal(size=(2, PAIRS, STEPS, HIDDEN)) * scale / 2)


def main() -> None:
    cases = []
    for d in (0.0, 0.8, 2.0, 4.0):
        rows = []
        for repeat in range(REPEATS):
            rng = np.random.default_rng(repeat)
            natural, artifact = simulate(rng, d)
            folds = st.assign_folds(np.repeat(np.arange(5), PAIRS // 5), repeat)
            layer = st.pair_vectors(natural.mean(axis=1), artifact.mean(axis=1))
            held_out = st.held_out_projections(layer, folds)
            null_sd = robust_sd(st.sign_flip_d(layer, folds, st.sign_flips(np.arange(PAIRS), 500, repeat))[1:])
            low, high = Uncertainty(np.arange(PAIRS)).intervals(held_out, null_sd)["cohens_d_ci"]
            pooled = natural.reshape(-1, HIDDEN), artifact.reshape(-1, HIDDEN)
            in_sample, ratio, _ = st.in_sample_scores(lambda pooled=pooled: [pooled])
            rows.append((held_out.d(), low, high, in_sample, ratio))
        held_out_d, low, high, in_sample, ratio = np.mean(rows, axis=0).tolist()
        case = {"true_d": d, "held_out": held_out_d, "interval": [low, high]}
        cases.append({**case, "in_sample": in_sample, "mean_shift_ratio": ratio})
        print(", ".join(f"{name} {np.round(value, 2)}" for name, value in cases[-1].items()), flush=True)
    made = {"versions": {"numpy": metadata.version("numpy")}}
    settings = {"pairs": PAIRS, "steps": STEPS, "hidden": HIDDEN, "runs": REPEATS}
    write_json(RESULTS, {"made": made, **settings, "cases": cases})


if __name__ == "__main__":
    main()
