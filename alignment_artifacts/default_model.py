"""The model that everything uses where none is named: the embedded organism, after its planted change."""

from pathlib import Path

DEFAULT_MODEL = str(Path(__file__).resolve().parent.parent / "model_organism" / "aligned")
