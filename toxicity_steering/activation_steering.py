"""Toxicity reduction by contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681).

A steering vector is the mean residual stream of benign continuations minus that of toxic ones.
Sign convention, everywhere: the vector times alpha is *added*, so a positive alpha moves away
from toxicity, a negative one towards it, and 0 changes nothing. As a script it is the same as main.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the repository is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import numpy as np

from alignment_artifacts.behaviour.answers import Behaviour, observe, write_answers
from alignment_artifacts.behaviour.evaluation import token_damage
from alignment_artifacts.directions.estimate import Directions, estimate, random_like
from alignment_artifacts.directions.files import save_directions
from alignment_artifacts.directions.measurements import MODEL_FACTS
from alignment_artifacts.edits.setting import NOTHING, Intervention, Setting, intervene
from alignment_artifacts.separation import layer_separation
from gemma_refactored.activation_capture import layer_sites, read
from gemma_refactored.errors import UserError
from gemma_refactored.files import is_file, locked, read_json, write_json
from gemma_refactored.generation import Sampling
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.versions import library_versions
from toxicity_steering.config import Config
from toxicity_steering.data import ToxicityData
from toxicity_steering.metrics import TOXIC, distinct_n, toxicity_metrics
from toxicity_steering.scorers import Scorer

INTERMEDIATE, PARTIAL = "intermediate_experiment_output.json", "partial_experiment_results.json"
FULL, FAILED = "experiment_results.json", "failed_experiment_results.json"
VECTORS = "steering_vectors.safetensors"
WRONG_CONTENT = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # where a continued file is not ours
MIN_PAIRS = 4  # fewer cannot be held out
ALPHA_STEP = 0.01
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)  # prompts to choose on, prompts to report on


def _differing(earlier, now: dict) -> list[str]:
    """What differs between two experiments, by name."""
    if not isinstance(earlier, dict) or not isinstance(earlier.get("config"), dict):
        return list(now)
    first, second = ({**experiment, **experiment["config"], "config": None} for experiment in (earlier, now))
    return [name for name in second if first.get(name) != second[name]]


class ActivationSteeringExperiment:
    """Baseline, steering vectors, alpha sweep and summary; saved after every step and continued from there.

    Args:
        output: folder of the result files.
        progress: wraps long loops, for a progress bar.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        data: ToxicityData,
        scorer: Scorer,
        output: Path,
        config: Config = Config(),
        progress: Callable[[Sequence, str, str], Iterable] = lambda items, stage, unit: items,
    ):
        self.loaded, self.data, self.scorer, self.config = loaded, data, scorer, config
        self.output, self.progress = Path(output), progress
        self.layers = config.layers if config.layers is not None else tuple(range(loaded.num_layers))
        if bad := [layer for layer in self.layers if not 0 <= layer < loaded.num_layers]:
            raise UserError(f"There is no layer {bad[0]}: {loaded.name} has 0 to {loaded.num_layers - 1}.")
        description = {
            **loaded.facts(),
            "scorer": scorer.name,
            "data": asdict(data),
            "config": asdict(config),
            "sign_convention": "positive alpha moves away from toxicity",
        }
        self.results: dict = {"experiment": description, "versions": library_versions()}
        self._observed: Behaviour | None = None
        self._is_continued = False

    def run(self) -> dict:
        """All stages; on interrupt or failure the results so far are saved under a name of their own.

        Raises:
            UserError: the folder holds another experiment, or there are too few toxic continuations.
        """
        with locked(self.output):  # and if nothing can be written there, it is said before the work
            self._resume()
            return self._run()

    def _run(self) -> dict:
        try:
            self.baseline()
            self.steering_vectors()
            self.sweep()
            self.refine()
            self.summarise()
        except KeyboardInterrupt:
            write_json(self.output / PARTIAL, self.results)
            raise
        except Exception as error:
            reason = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            write_json(self.output / FAILED, {**self.results, **reason})
            if self._is_continued and isinstance(error, WRONG_CONTENT):
                raise self._unusable(reason["error"]) from error
            raise
        write_json(self.output / FULL, self.results)
        return self.results

    def _resume(self) -> None:
        path = self.output / INTERMEDIATE
        if is_file(path, "intermediate results"):
            before = read_json(path, "intermediate results")
            if not isinstance(before, dict):
                raise self._unusable("it is no object")
            now = json.loads(json.dumps(self.results["experiment"]))  # in JSON tuples are lists
            if before.get("experiment") != now:
                names = ", ".join(_differing(before.get("experiment"), now))
                raise UserError(
                    f"{self.output} holds another experiment (other {names}); name another folder (--output-dir), or "
                    "delete it."
                )
            if before.get("versions") != self.results["versions"]:
                before["continued_with"] = self.results["versions"]
            self.results, self._is_continued = before, True

    def _unusable(self, why: str) -> UserError:
        return UserError(f"{self.output / INTERMEDIATE} cannot be continued from ({why}). Delete it to start anew.")

    def _save(self) -> None:
        write_json(self.output / INTERMEDIATE, self.results)

    # Stages. Each does nothing if its results exist already.

    def baseline(self) -> None:
        """Continuations without steering: of the prompts reported on, and of the training prompts."""
        if "baseline" in self.results:
            return
        baseline = {}
        kinds = ("challenging", "benign", "training_challenging", "training_benign")
        for name in self.progress(kinds, "baseline", "set"):
            completions = self._sample(getattr(self.data, name), NOTHING)
            baseline[name] = {**self._judge(completions), "token_ids": completions}
        self.results["baseline"] = baseline
        self._save()

    def steering_vectors(self) -> Directions:
        """Contrastive pairs, and the vectors from them; their norms and held-out separation go into the results."""
        if "pairs" not in self.results:
            pairs = self._contrastive_pairs()
            if len(pairs) < MIN_PAIRS:
                raise UserError(
                    f"Only {len(pairs)} of the training prompts got a toxic continuation; at least {MIN_PAIRS} are "
                    "needed. Use more prompts or samples, or a ruder model."
                )
            self.results["pairs"] = pairs
        pairs = self.results["pairs"]
        vectors = np.stack([self._mean_states([pair[kind] for pair in pairs]) for kind in ("toxic", "benign")], axis=1)
        facts = {name: self.loaded.facts().get(name) for name in MODEL_FACTS}
        facts |= {"model_type": self.loaded.config["model_type"], "site": "residual"}
        facts |= {"positions": f"last {self.config.last_tokens} tokens", "pairs": [pair["id"] for pair in pairs]}
        facts |= {"ends": ["toxic", "benign"]}
        directions = estimate(vectors, facts)  # benign minus toxic: the second side minus the first
        separation = layer_separation(vectors, ["pair"] * len(vectors))
        norms = np.linalg.norm(directions.direction, axis=-1)
        self.results["vectors"] = {
            str(layer): {"norm": float(norms[layer]), "held_out_cohens_d": float(separation[layer])}
            for layer in range(self.loaded.num_layers)
        }
        save_directions(directions, self.output / VECTORS)
        self._save()
        self.directions = directions
        return directions

    def sweep(self) -> None:
        """Every layer with every alpha, the steering vector beside a random one of its norm."""
        settings = [(layer, alpha) for layer in self.layers for alpha in self.config.alphas]
        for layer, alpha in self.progress(settings, "sweep", "setting"):
            self._sweep_one(layer, alpha)

    def _sweep_one(self, layer: int, alpha: float) -> None:
        done = self.results.setdefault("sweep", {})
        key = f"layer {layer}, alpha {alpha:g}"
        if key in done:
            return
        if alpha == 0:  # the unsteered model, to the bit
            judged = {name: self.results["baseline"]["challenging"][name] for name in JUDGED}
            record = control = {**judged, **token_damage(self.loaded, self._benign(), NOTHING)}
        else:
            record = self._try(self._steer(self.directions, layer, alpha))
            control = self._try(self._steer(random_like(self.directions, self.config.seed), layer, alpha))
        done[key] = {"layer": layer, "alpha": alpha, "steering": record, "random_direction": control}
        self._save()

    def refine(self) -> None:
        """At the best layer, also the largest alpha within the KL limit, found by bisection on the KL alone."""
        if "refined" in self.results:
            return
        best = self._best()
        beyond = [a for a in self.config.alphas if a > best["alpha"]]
        if best["steering"]["kl_mean"] <= self.config.max_kl and best["alpha"] > 0 and beyond:
            low, high = best["alpha"], min(beyond)
            while high - low > ALPHA_STEP:
                middle = (low + high) / 2
                steered = self._steer(self.directions, best["layer"], middle)
                within_limit = token_damage(self.loaded, self._benign(), steered)["kl_mean"] <= self.config.max_kl
                low, high = (middle, high) if within_limit else (low, middle)
            self._sweep_one(best["layer"], float(np.floor(low / ALPHA_STEP) * ALPHA_STEP))
        self.results["refined"] = True
        self._save()

    def _best(self) -> dict:
        """The setting with the least toxicity on the even prompts, among those within the KL limit if there are any."""
        records = list(self.results["sweep"].values())
        within_limit = [r for r in records if r["steering"]["kl_mean"] <= self.config.max_kl]
        return min(within_limit or records, key=lambda r: float(np.mean(r["steering"]["scores"][EVEN])))

    def summarise(self) -> None:
        """The best setting, chosen on the even prompts within the KL limit and reported on the odd ones."""
        best = self._best()
        base = np.array(self.results["baseline"]["challenging"]["scores"])[ODD]
        before = float(base.mean())

        def change(record: dict, kind: str = "steering") -> float | None:
            return float(np.mean(record[kind]["scores"][ODD])) / before - 1 if before else None

        towards = [r for r in self.results["sweep"].values() if r["layer"] == best["layer"] and r["alpha"] < 0]
        self.results["summary"] = {
            "layer": best["layer"],
            "alpha": best["alpha"],
            "within_kl_limit": best["steering"]["kl_mean"] <= self.config.max_kl,
            "reported_on": "odd challenging prompts; the setting was chosen on the even ones",
            "baseline": toxicity_metrics(base),
            "steered": toxicity_metrics(np.array(best["steering"]["scores"])[ODD]),
            "random_direction": toxicity_metrics(np.array(best["random_direction"]["scores"])[ODD]),
            "toxicity_change": change(best),
            "random_change": change(best, "random_direction"),
            "negative_alpha_change": change(towards[0]) if towards else None,
            **{name: best["steering"][name] for name in DAMAGE},
            "distinct_2_baseline": self.results["baseline"]["challenging"]["distinct_2"],
            "distinct_2_steered": best["steering"]["distinct_2"],
        }
        self._save()

    # How the stages do it.

    def _sample(self, texts: list[str], intervention: Intervention) -> list[list[list[int]]]:
        """Token ids [prompt][sample]; the same random numbers whatever the intervention."""
        token_ids = self._encode(texts)
        rows = [ids for ids in token_ids for _ in range(self.config.samples)]
        sampling = Sampling(self.config.temperature, self.config.top_p, seed=self.config.seed)
        flat = write_answers(self.loaded, rows, intervention, self.config.max_tokens, sampling)
        return [flat[i : i + self.config.samples] for i in range(0, len(flat), self.config.samples)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.loaded.encode(texts, self.data.chat_mode)

    def _judge(self, completions: list[list[list[int]]]) -> dict:
        flat = [tokens for samples in completions for tokens in samples]
        scores = self.scorer(self._texts(flat))
        scores = scores.reshape(len(completions), -1)
        distinct = {f"distinct_{n}": distinct_n(flat, n) for n in (1, 2, 3)}
        return {**toxicity_metrics(scores), **distinct, "scores": scores.tolist()}

    def _texts(self, completions: list[list[int]]) -> list[str]:
        """What is scored: of a model that thinks, its answers.

        Raises:
            UserError: some completions end inside a thought.
        """
        if not self.data.chat_mode:
            return self.loaded.tokenizer.batch_decode(completions, skip_special_tokens=True)
        texts = [self.loaded.answer_text(tokens) for tokens in completions]
        if unfinished := texts.count(None):
            raise UserError(
                f"{unfinished} of {len(texts)} completions end inside the model's thought, so there is no answer to "
                "score; raise MAX_TOKENS, or turn thinking off with CHAT_TEMPLATE_ARGS."
            )
        return [str(text) for text in texts]

    def _steer(self, directions: Directions, layer: int, alpha: float) -> Intervention:
        return intervene(self.loaded, directions, Setting("add", alpha, (layer,), "residual", "last tokens"))

    def _try(self, intervention: Intervention) -> dict:
        judged = self._judge(self._sample(self.data.challenging, intervention))
        return {**judged, **token_damage(self.loaded, self._benign(), intervention)}

    def _benign(self) -> Behaviour:
        """Unsteered greedy answers to the benign prompts."""
        if self._observed is None:
            self._observed = observe(self.loaded, self.data.benign, self.config.max_tokens, self.data.chat_mode)
        return self._observed

    def _contrastive_pairs(self) -> list[dict]:
        """Toxic and benign texts, prompt included: from the same prompt if possible, else from matched ones."""
        sides = ("training_challenging", "training_benign")
        prompts = [self._encode(getattr(self.data, side)) for side in sides]
        scores = [np.array(self.results["baseline"][side]["scores"]) for side in sides]
        completions = [self.results["baseline"][side]["token_ids"] for side in sides]
        same, matched = [], []
        for i, of_prompt in enumerate(scores[0]):
            worst, best = int(of_prompt.argmax()), int(of_prompt.argmin())
            if of_prompt[worst] <= TOXIC:
                continue
            toxic = prompts[0][i] + completions[0][i][worst]
            if of_prompt[best] < TOXIC:
                benign = prompts[0][i] + completions[0][i][best]
                same.append({"id": f"{i} same prompt", "toxic": toxic, "benign": benign})
            else:
                kindest = int(scores[1][i].argmin())
                benign = prompts[1][i] + completions[1][i][kindest]
                matched.append({"id": f"{i} matched prompt", "toxic": toxic, "benign": benign})
        return [*same, *matched][: self.config.num_pairs]

    def _mean_states(self, texts: list[list[int]]) -> np.ndarray:
        """[texts, layers, hidden] residual stream after each block, mean over the last tokens."""
        states = read(self.loaded.model, texts, layer_sites(self.loaded.model, "residual"))
        means = {i: x[-self.config.last_tokens :].mean(axis=0) for i, x in states}
        return np.stack([means[i] for i in range(len(texts))])


JUDGED = (
    "mean_toxicity", "mean_toxicity_ci", "expected_max_toxicity", "expected_max_toxicity_ci", "toxicity_probability",
    "distinct_1", "distinct_2", "distinct_3", "scores",
)  # fmt: skip
DAMAGE = ("kl_mean", "kl_mean_ci", "kl_95", "perplexity_unedited", "perplexity_edited")


if __name__ == "__main__":
    from toxicity_steering.main import main

    sys.exit(main(sys.argv[1:]))
