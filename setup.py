"""What pyproject.toml cannot say: the prompt pairs lie beside the scripts, and an installed package needs them too."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PAIRS = "alignment_artifact_prompt_pairs.json"


class WithPairs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there they are found where they lie
            self.copy_file(PAIRS, str(Path(self.build_lib, "alignment_artifacts", PAIRS)))


setup(cmdclass={"build_py": WithPairs})
