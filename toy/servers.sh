# What toy/run.sh and toy/ablations.sh share: the environment, and servers that end with the script.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PWD/.venv/bin:$PATH
if [ -d .venv-cpu ]; then PATH=$PWD/.venv-cpu/bin:$PATH; fi # on a machine with a GPU: see Makefile
export CUDA_VISIBLE_DEVICES=
OUT=out/toy               # the presets toy/*.args name it too
export OMP_NUM_THREADS=1  # two processes on two cores: more threads only get in each other's way
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

serve_stand_in() { # the annotator and the consistency judge: rules behind HTTP, no model
    python toy/server.py --key $OUT/data/key.jsonl --port 8010 > $OUT/server.log 2>&1 &
}

# A judge whose requests have a seed, as evaluate.py's do, also needs --no-enable-chunked-prefill
# --max-num-batched-tokens 8192 on a CPU: a seeded prompt in chunks stops vLLM there.
serve_model() { # folder, port: a real vLLM server on this machine
    VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model "$1" \
        --dtype float32 --enforce-eager --max-model-len 1024 \
        --host 127.0.0.1 --port "$2" > "$OUT/server-$2.log" 2>&1 &
}

wait_for() { # port: until a server answers there
    python - "$1" <<'PY'
import sys, time, urllib.request
for _ in range(600):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5)
        sys.exit()
    except OSError:
        time.sleep(0.5)
sys.exit(f"no server answers on port {sys.argv[1]}")
PY
}
