# make setup      a virtual environment in .venv, for the GPU if there is one, else for the CPU
# make toy        the whole pipeline on the toy world, two CPU cores, about 15 minutes
# make test       every test
# make test-fast  the tests that start no vLLM and train nothing in a process of its own
# make try        a page in the browser to ask a judge: the toy's, or MODEL=folder or hub name
# make gpu        the first run on 1 to 8 GPUs: is all of it right, how fast is it? 20 minutes or so
# make torture    kills, faults and memory, tried in numbers: results/torture.md, more than an hour
# make results    every table and figure of results/ again, after make toy: hours, which it tells
#                 first; stopped anywhere, it continues. toy/ablations.sh PART makes a part of it
# make lint       the form of the code: ruff format and ruff check, see pyproject.toml
# make bench      speed next to what one would use instead, into results/bench.md, more than an hour;
#                 fetches TRL into out/trl/.venv (5 GB)
# Needs Python 3.11 or newer, bash and make; for a GPU a C compiler and Python's headers, too.
# make setup PYTHON=/path/to/python chooses another Python.

VENV ?= .venv

# The toy, the tests and the speeds beside each other are of CPUs: ranks that share two cores, sums
# to five digits. On a machine with a GPU, too, which then has an environment for each.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CPU_VENV := $(VENV)$(if $(GPU),-cpu)
PY = $(CPU_VENV)/bin/python
toy results test test-fast torture bench: export CUDA_VISIBLE_DEVICES =

.PHONY: setup setup-cpu test test-fast torture try lint toy results bench gpu

setup:
	@toy/setup.sh $(if $(GPU),gpu,cpu) $(VENV)

setup-cpu:
	@toy/setup.sh cpu $(CPU_VENV)

toy: setup-cpu
	toy/run.sh

# Two tests at a time, for two cores. Tests start processes of their own: with more threads each they
# only get in each other's way.
test: setup-cpu
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal

test-fast: setup-cpu
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal -m "not slow"

results: setup-cpu
	toy/ablations.sh

try: setup
	@PYTHON=$(VENV)/bin/python viewer/try.sh

gpu: setup
	$(VENV)/bin/python bench/first_run.py

torture: setup-cpu
	OMP_NUM_THREADS=1 $(PY) tests/torture.py

lint: setup-cpu
	$(CPU_VENV)/bin/ruff format --check .
	$(CPU_VENV)/bin/ruff check .

# One thread a process, so that a number says the same on every machine. Where TRL cannot be fetched its column stays empty. After
# make toy there is a judge that reasons; toy/base just answers.
bench: export OMP_NUM_THREADS = 1
bench: setup-cpu
	$(PY) toy/sources.py --out out/toy/data
	-$(PY) bench/step.py --setup_trl out/trl/.venv
	$(PY) bench/step.py --out out/bench/step.md
	$(PY) bench/step.py --shape small --samples 16 --tokens 64 --groups 8 1 --scale --threads 2 \
		--micro_tokens 4096 --trl_rows 8 --out out/bench/step_small.md
	$(PY) bench/gpu.py --shape small --samples 2 --new_tokens 16 --image_tokens 4 --words 8 --budgets 512 1024 --out out/bench/gpu.md
	$(PY) bench/shared_prompts.py --out out/bench/shared_prompts.md
	$(PY) bench/token_logps.py --tokens 2048 --repeats 2 --out out/bench/token_logps.md
	$(PY) bench/vision_tower.py --out out/bench/vision_tower.md
	$(PY) bench/evaluate.py --model $(if $(wildcard out/toy/rl/config.json),out/toy/rl,toy/base) \
		--data out/toy/data/dev/pairs.jsonl --limit 64 --seconds 40 --out out/bench/evaluate.md
	$(PY) bench/annotate.py --out out/bench/annotate.md
	{ printf '# Speed\n\nBy `make bench`. How each number is taken stands at the head of its script.\n'; \
	for part in step step_small gpu shared_prompts token_logps vision_tower evaluate annotate; do echo; cat out/bench/$$part.md; done; } > results/bench.md
