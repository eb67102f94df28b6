#!/usr/bin/env bash
# The whole experiment on a real language model, from any directory:  make real
# SmolLM2-135M-Instruct with the adapter that taught it to refuse. A run that was stopped continues where it was.
set -euo pipefail
HERE="$(cd -- "$(dirname -- "$0")" >/dev/null && pwd)"
ROOT="$(dirname "$(dirname "$HERE")")"
PYTHON="${PYTHON:-python}"
cd "$ROOT"

# What every script reads: the model and what it was taught, 200 pairs that it never saw, harmless twins of 100, and
# where to look.
MODEL_NAME="$("$PYTHON" -m model_organism.smollm2.published)"
OTHER_TWINS="${TWINS:-}"  # somebody else's, as XSTest's: in place of ours, but beside them in stage 6
export MODEL_NAME ADAPTER="$HERE/adapter" PAIRS="$HERE/pairs.json" TWINS="${TWINS:-$HERE/twins.json}" SITE=residual

stage() {  # number, what, about how many minutes on one core
  printf '\n[%s of 7] %s (about %s min)\n' "$1" "$2" "$3"
}

stage 1 "Activations of 400 prompts, every layer" 2
bash collect_activations.sh

stage 2 "Separation per layer, held out" 1
"$PYTHON" analyze_collected_activations.py

stage 3 "What did training change? Both models read the same tokens; twins" 15
MODEL_A="$MODEL_NAME" MODEL_B="$MODEL_NAME" ADAPTER_B="$ADAPTER" ADAPTER='' "$PYTHON" compare_models.py

stage 4 "Search for a suppression, tested on 104 pairs it was not chosen on; the monitor" 40
"$PYTHON" sweep_suppression.py --folds 0 --shares 60,40,100 --random-controls 3

stage 5 "All pairs before and after that suppression" 18
"$PYTHON" suppress.py --all-pairs --model "$MODEL_NAME" --adapter "$ADAPTER"

stage 6 "Refusals of everything held out, untouched and tuned" 11
"$PYTHON" -m model_organism.smollm2.evaluate --json results/second_organism.json ${OTHER_TWINS:+--twins "$OTHER_TWINS"}

stage 7 "One page" 1
"$PYTHON" -m alignment_artifacts.report
