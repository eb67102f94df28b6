# `make`: the main job on the embedded model. `make test`: the tests. Both set up .venv first.
# MODEL_NAME=mlx-community/gemma-3-1b-it-qat-4bit make   runs it on another model.
.PHONY: all setup collect check analyse compare transcripts report sweep toxicity real test fuzz bench organism organism2 clean

# The model is named once, on top of collect_activations.sh. Its activations and results get folders of their own.
named = $(or $($(1)),$(strip $(shell sed -n 's/^$(1)="*\($${$(1):-\)\{0,1\}\([^"}\#]*\).*/\2/p' collect_activations.sh)))
MODEL := $(call named,MODEL_NAME)
ADDED := $(call named,ADAPTER)
all collect check analyse compare transcripts sweep: export MODEL_NAME := $(MODEL)
all collect check analyse compare transcripts sweep: export ADAPTER := $(ADDED)

PYTHON := .venv/bin/python
OPENBLAS := $(shell ldconfig -p 2>/dev/null | grep -c libopenblas)

# A model that fails its check is analysed anyway; the analysis says so.
# The embedded model is also compared with what it was before its change, a model with an adapter with that without.
all: collect
	-@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory analyse $(if $(ADDED)$(filter model_organism/aligned,$(MODEL)),compare)
	-@$(MAKE) --no-print-directory transcripts
	@$(MAKE) --no-print-directory report

# Linux without a GPU needs OpenBLAS (matrix products 20 times as fast); try to install it if we may.
setup: .venv/.installed
.venv/.installed: pyproject.toml setup.py constraints.txt
	@if [ "$$(uname -s)" = Linux ] && [ "$(OPENBLAS)" = 0 ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq libopenblas0 >/dev/null || true; fi
	@test -x $(PYTHON) || python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed.")'
	@test -x $(PYTHON) || python3 -m venv .venv
	@echo "Installing into .venv (once) .."
	@$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[cpu,test]"
	@touch $@

collect: setup
	bash collect_activations.sh

check: setup               # batch = single, cached = uncached, capture on = off, .. on this machine
	$(PYTHON) run_model.py --check --model "$$MODEL_NAME" $${ADAPTER:+--adapter "$$ADAPTER"} $${ACTIVATIONS_DIR:+--activations-dir "$$ACTIVATIONS_DIR"}

analyse: setup
	$(PYTHON) analyze_collected_activations.py

compare: setup             # two models and twins: is it alignment, or just different words? MODEL_A=.. MODEL_B=..
	$(if $(ADDED),MODEL_A="$${MODEL_A:-$$MODEL_NAME}" MODEL_B="$${MODEL_B:-$$MODEL_NAME}" ADAPTER_B="$${ADAPTER_B:-$$ADAPTER}") \
	  $(PYTHON) compare_models.py

transcripts: setup         # every pair answered before and after suppression
	$(PYTHON) suppress.py --all-pairs --model "$$MODEL_NAME" $${ADAPTER:+--adapter "$$ADAPTER"}

report: setup              # one page with all available results
	$(PYTHON) -m alignment_artifacts.report

sweep: setup               # which suppression works, at what cost
	$(PYTHON) sweep_suppression.py
	@$(MAKE) --no-print-directory transcripts
	@$(MAKE) --no-print-directory report

toxicity: setup            # the second experiment: steering away from toxicity
	$(PYTHON) -m toxicity_steering.main
	@$(MAKE) --no-print-directory report

real: setup                # the whole experiment on a real language model, about 80 minutes; fetches its weights (93 MB)
	PYTHON=$(PYTHON) bash model_organism/smollm2/experiment.sh

test: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m vulture
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -n 2 --dist loadfile

fuzz: setup                # the property tests on new random examples, ten times as many as in `make test`
	$(PYTHON) -m pytest -n 2 -m hypothesis --hypothesis-profile=fuzz

bench: setup               # collection compared with other libraries, about half an hour; they go into .venv-bench
	@test -x .venv-bench/bin/python || python3 -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/requirements.txt
	.venv-bench/bin/python -m benchmarks.collection_speed
	.venv-bench/bin/python -m benchmarks.architectures

organism: setup            # trains the embedded model again, about 15 minutes
	$(PYTHON) -m model_organism.train
	$(PYTHON) -m model_organism.evaluate --json results/model_organism.json

organism2: setup           # teaches SmolLM2 to refuse again, about an hour
	$(PYTHON) -m model_organism.smollm2.train
	$(PYTHON) -m model_organism.smollm2.evaluate --json results/second_organism.json --show 5

clean:                     # results only; the environment and the cache of measurements stay
	rm -rf collected_activations_* inference_output results prompts_for_gemma_runner.json \
	  alignment_artifact_analysis_results.json alignment_artifact_analysis_plot.png \
	  alignment_artifact_analysis_plot.pdf .writing.*.tmp
