"""Generate answers and save activations; `python run_model.py --help`."""

import sys

from alignment_artifacts import places
from gemma_refactored.main import main

if __name__ == "__main__":
    sys.exit(main(None, places.collection_folder, places.HOME / "inference_output", places.find_model))
