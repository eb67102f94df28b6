"""Generate answers and save activations; `python run_model.py --help`."""

import sys

from gemma_refactored.main import main

if __name__ == "__main__":
    sys.exit(main())
