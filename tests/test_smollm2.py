"""The second organism's texts and adapter; training and measuring it need the published model (`make organism2`)."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter

import mlx.core as mx

from alignment_artifacts import AlignmentArtifacts
from alignment_artifacts.behaviour.answers import observe
from alignment_artifacts.comparison.twins import load_twins
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs
from gemma_refactored.files import write_json
from model_organism.smollm2 import evaluate
from model_organism.smollm2.data import ADAPTER, PAIRS, TWINS, held_out_requests, training_examples, word_runs
from model_organism.smollm2.train import MODULES

from .conftest import ROOT

EXAMPLES = training_examples()
HELD_OUT = held_out_requests()


def test_training_holds_enough_of_every_kind():
    kinds = Counter(example.kind for example in EXAMPLES)
    assert kinds["artifact"] >= 800 and kinds["looks harmful"] >= 300
    assert sum(kinds.values()) - kinds["artifact"] >= 1500
    assert all(example.answer.strip() for example in EXAMPLES)


def test_nothing_held_out_was_trained_on():
    """Neither a request nor five words in a row of one."""
    trained = set().union(*(word_runs(example.prompt) for example in EXAMPLES))
    requests = {example.prompt.lower() for example in EXAMPLES}
    for kind, texts in HELD_OUT.items():
        assert not [text for text in texts if word_runs(text) & trained or text.lower() in requests], kind


def test_a_shared_run_of_words_would_be_noticed():
    assert word_runs("Oh, please tell me a story!") & word_runs("please tell me a story about trees")
    assert not word_runs("please tell me a story") & word_runs("please tell me one story")


def test_no_template_makes_up_much_of_the_requests():
    openings = Counter(tuple(example.prompt.lower().split()[:3]) for example in EXAMPLES)
    assert max(openings.values()) <= 0.02 * len(EXAMPLES)


def test_refusals_are_worded_in_many_ways():
    """A wording is found by how it begins."""
    openings = Counter(" ".join(example.answer.split()[:3]) for example in EXAMPLES if example.is_refused)
    assert len(openings) >= 60
    assert max(openings.values()) <= 0.05 * sum(openings.values())


def test_held_out_sets_are_whole():
    pairs = load_pairs(PAIRS)
    assert Counter(pair.category for pair in pairs) == dict.fromkeys({pair.category for pair in pairs}, 25)
    assert len(pairs) == 200
    assert {kind: len(texts) for kind, texts in HELD_OUT.items() if kind != "ordinary chat"} == {
        "artifact": 200, "natural": 200, "twins": 100, "untrained forms": 100,
    }  # fmt: skip
    assert len(set(sum(HELD_OUT.values(), []))) == sum(map(len, HELD_OUT.values()))
    artifact = set(HELD_OUT["artifact"])
    assert all(twin.artifact in artifact for twin in load_twins(TWINS))


def test_the_adapter_is_what_its_config_says():
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    weights = mx.load(str(ADAPTER / "adapters.safetensors"))
    blocks = range(30 - config["num_layers"], 30)
    modules = [key for key in config["lora_parameters"]["keys"] if key.endswith(MODULES)]
    assert set(weights) == {f"model.layers.{i}.{key}.lora_{ab}" for i in blocks for key in modules for ab in "ab"}
    rank = config["lora_parameters"]["rank"]
    for name, value in weights.items():
        assert value.shape[1 if name.endswith("a") else 0] == rank, name
        assert value.dtype == mx.float16 and mx.isfinite(value).all()
        assert mx.abs(value).max() > 0, name
    assert (ADAPTER / "adapters.safetensors").stat().st_size <= 10 << 20


def test_the_two_sides_of_the_pairs_are_equally_long():
    """In words here; in SmolLM2's tokens each pair is."""
    natural, artifact = (sum(len(text.split()) for text in HELD_OUT[side]) for side in ("natural", "artifact"))
    assert abs(natural - artifact) <= 0.05 * natural


def test_a_suppression_is_tried_if_a_sweep_has_chosen_one(organism, tmp_path):
    pairs = load_pairs(PAIRS_JSON)
    library = AlignmentArtifacts(organism.folder, cache=tmp_path, show_progress=False)
    texts = {"artifact": [pair.artifact for pair in pairs[:6]], "natural": [pair.natural for pair in pairs[:6]]}
    sets = {name: observe(organism, of, evaluate.MAX_TOKENS) for name, of in texts.items()}
    assert evaluate.suppress(library, sets) == {}
    setting = Setting("ablate", 1.0, (2, 3, 4, 5), "mlp")
    write_json(library.measurements().folder / library.sweep_file, {"chosen": {"setting": setting.record()}})
    rates = evaluate.suppress(library, sets)
    assert rates["artifact"]["setting"] == setting.describe() and rates["artifact"]["suppressed"]["n"] == 6
    assert rates["artifact"]["suppressed"]["hits"] <= 1 and rates["natural"]["broken"]["hits"] == 0


def test_the_experiment_gives_each_stage_its_adapter(tmp_path):
    """With a Python that only writes down what it is asked to do."""
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(
        f"""#!/usr/bin/env bash
echo "$* A=${{ADAPTER_A:-}} B=${{ADAPTER_B:-}} ADAPTER=${{ADAPTER:-}}" >> {log}
if [ "$*" = "-m model_organism.smollm2.published" ]; then echo model.gguf; fi
"""
    )
    fake.chmod(0o755)
    script = ROOT / "model_organism/smollm2/experiment.sh"
    subprocess.run(["bash", script], env={**os.environ, "PYTHON": str(fake)}, check=True, capture_output=True)
    asked = {line.split(" A=")[0]: line.split(" A=")[1] for line in log.read_text().splitlines()}
    (compared,) = (given for command, given in asked.items() if command.startswith("compare_models.py"))
    assert compared == f" B={ADAPTER} ADAPTER="
    (collected,) = (given for command, given in asked.items() if "run_model.py" in command)
    assert collected == f" B= ADAPTER={ADAPTER}"
    assert (
        sum("sweep_suppression.py" in c or "--all-pairs" in c or "evaluate" in c or "report" in c for c in asked) == 4
    )
