#!/usr/bin/env bash
# Collect activations of every layer for the prompt pairs:  bash collect_activations.sh
# Each constant can be overridden from the environment:  MODEL_NAME=mlx-community/gemma-3-1b-it-qat-4bit bash ...
# Default files are beside this script, wherever you call it from; paths you type are relative to where you are.
set -euo pipefail
HERE="$(cd -- "$(dirname -- "$0")" >/dev/null && pwd)"

MODEL_NAME="${MODEL_NAME:-model_organism/aligned}"   # the embedded model; any Gemma or mlx-lm model will do
ADAPTER="${ADAPTER:-}"                         # a LoRA adapter to add to it: a folder of mlx-lm or PEFT
MAX_TOKENS="${MAX_TOKENS:-20}"
BATCH_SIZE="${BATCH_SIZE:-100}"
TEMPERATURE="${TEMPERATURE:-0}"
TOP_P="${TOP_P:-1.0}"
REPETITION_PENALTY="${REPETITION_PENALTY:-1.0}"
SEED="${SEED:-0}"
SYSTEM_PROMPT="${SYSTEM_PROMPT:-}"             # the system message before each prompt
CHAT_TEMPLATE="${CHAT_TEMPLATE:-}"             # the name of one of several, or a file
CHAT_TEMPLATE_ARGS="${CHAT_TEMPLATE_ARGS:-}"   # variables of the template as JSON: {"enable_thinking": false}
SITE="${SITE:-}"     # mlp, attention or residual; the analysis reads it too
PAIRS="${PAIRS:-}"   # your own prompt pairs; every script reads it
for NAME in SITE PAIRS; do if [ -n "${!NAME}" ]; then export "${NAME?}"; else export -n "${NAME?}"; fi; done
ACTIVATION_FILTER="${ACTIVATION_FILTER:-${SITE:-mlp.output}}"
ACTIVATION_DTYPE="${ACTIVATION_DTYPE:-float32}"
PROMPTS_FILE="${PROMPTS_FILE:-$HERE/prompts_for_gemma_runner.json}"   # the default is made from the prompt pairs
ACTIVATIONS_DIR="${ACTIVATIONS_DIR:-}"   # empty: a folder for each model, pairs file and site (alignment_artifacts/places.py)
OUTPUT_DIR="${OUTPUT_DIR:-$HERE/inference_output}"

if [ -z "${PYTHON:-}" ]; then
  if [ -x "$HERE/.venv/bin/python" ]; then PYTHON="$HERE/.venv/bin/python"; else PYTHON=python3; fi
fi
if ! "$PYTHON" -c "import importlib.util as u; assert all(map(u.find_spec, ('mlx', 'mlx_lm', 'transformers')))" 2>/dev/null; then
  echo "Error: MLX or mlx-lm is not installed for $PYTHON. Run \`make\`, or: pip install -r requirements.txt" >&2
  exit 2
fi

[ "$PROMPTS_FILE" != "$HERE/prompts_for_gemma_runner.json" ] || "$PYTHON" "$HERE/create_gemma_runner_input.py"

exec "$PYTHON" "$HERE/run_model.py" \
  --model "$MODEL_NAME" ${ADAPTER:+--adapter "$ADAPTER"} --prompts-file "$PROMPTS_FILE" --process-by-group \
  --save-activations ${ACTIVATIONS_DIR:+--activations-dir "$ACTIVATIONS_DIR"} \
  --activation-filter "$ACTIVATION_FILTER" --activation-dtype "$ACTIVATION_DTYPE" \
  --max-tokens "$MAX_TOKENS" --batch-size "$BATCH_SIZE" --temp "$TEMPERATURE" --top-p "$TOP_P" \
  ${SYSTEM_PROMPT:+--system-prompt "$SYSTEM_PROMPT"} ${CHAT_TEMPLATE:+--chat-template "$CHAT_TEMPLATE"} \
  ${CHAT_TEMPLATE_ARGS:+--chat-template-args "$CHAT_TEMPLATE_ARGS"} \
  --repetition-penalty "$REPETITION_PENALTY" --seed "$SEED" --output-dir "$OUTPUT_DIR" "$@"
