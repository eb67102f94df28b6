#!/usr/bin/env bash
# The whole experiment, from any directory:  bash examples/sycophancy/run.sh
# With another model:  MODEL_NAME=mlx-community/gemma-3-1b-it-qat-4bit bash examples/sycophancy/run.sh
set -euo pipefail
HERE="$(cd -- "$(dirname -- "$0")" >/dev/null && pwd)"
ROOT="$(dirname "$(dirname "$HERE")")"
PYTHON="${PYTHON:-python}"

# What every script reads: model, pairs, where to look, what to measure of an answer, and where that is to go.
export MODEL_NAME="${MODEL_NAME:-HuggingFaceTB/SmolLM2-135M-Instruct}"
export PAIRS="$HERE/sycophancy.json" SITE=residual SCORE="$HERE/score.py:agreement" WISH=lower

# Can the activations tell whose belief it is?
bash "$ROOT/collect_activations.sh"
"$PYTHON" "$ROOT/analyze_collected_activations.py"

# Which edit lowers agreement within the budget, on pairs that it was not chosen on? (One split, short answers.)
"$PYTHON" "$ROOT/sweep_suppression.py" --folds 0 --shares 8,8,8 --max-tokens 24 --random-controls 3 \
  --suppression-scales "always=0.2,1 ablate=0.3,2 cap=0.5,3" --suppression-positions prompt_end \
  --suppression-trials 32 --suppression-generated 6

# All pairs before and after that edit; the tokens that the direction promotes; everything on one page.
"$PYTHON" "$ROOT/suppress.py" --all-pairs --model "$MODEL_NAME" --max-tokens 24
"$PYTHON" "$ROOT/suppress.py" --explain --model "$MODEL_NAME"
cd "$ROOT" && "$PYTHON" -m alignment_artifacts.report
