"""Results say which libraries made them."""

import importlib.metadata

import numpy as np

import alignment_artifacts
from alignment_artifacts.directions.estimate import Directions, estimate
from alignment_artifacts.directions.files import load_directions, save_directions, write_gguf
from alignment_artifacts.places import Origin
from gemma_refactored.versions import library_versions


def test_our_own_version_is_among_them():
    versions = library_versions()
    assert versions.keys() == {"mlx", "mlx-lm", "numpy", "transformers", "alignment-artifacts"}
    assert versions["numpy"] == np.__version__ == importlib.metadata.version("numpy")
    assert versions["alignment-artifacts"] == alignment_artifacts.__version__


def test_results_are_stamped_with_them():
    stamped = Origin("model", "sha256:1", "pairs.json", "abc").stamp({"d": 1})
    assert stamped["versions"] == library_versions() and stamped["d"] == 1


def test_directions_keep_those_they_were_made_with(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(4, 2, 3, 8))
    made = estimate(vectors, {"site": "residual", "positions": "prompt_end"})
    assert made.facts["versions"] == library_versions()
    older = Directions({**made.facts, "versions": {"mlx": "0.1"}}, made.direction)
    save_directions(older, tmp_path / "directions.safetensors")
    write_gguf(older, tmp_path / "directions.gguf")
    for file in tmp_path.iterdir():
        assert load_directions(file).facts["versions"] == {"mlx": "0.1"}
