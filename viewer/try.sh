#!/usr/bin/env bash
# make try [MODEL=folder or hub name] [PORT=8000]: a judge behind vLLM on this machine, and behind the
# next port the page that asks it. Ctrl-C ends both.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-out/toy/rl}
port=${PORT:-8000}
site=http://127.0.0.1:$((port + 1))
link="$site/try.html?url=http://127.0.0.1:$port/v1&model=$model"

if [ "$model" = out/toy/rl ] && [ ! -f out/toy/rl/config.json ]; then
    echo "try: no model in out/toy/rl yet; run make toy first, or name one: make try MODEL=toy/base" >&2
    exit 1
fi
flags=(--model "$model" --served-model-name "$model" --host 127.0.0.1 --port "$port")
flags+=(--allowed-origins "[\"$site\"]") # the page may ask, as no other does
if ! nvidia-smi -L > /dev/null 2>&1; then # chunked prefill: on a CPU seeded requests stop vLLM
    flags+=(--dtype float32 --enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens 8192)
fi
case "$model" in
out/toy/* | toy/*)
    flags+=(--max-model-len 1024)
    link="$link&max_tokens=128"
    ;;
esac

export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_LOGGING_LEVEL=WARNING
mkdir -p out
python=${PYTHON:-python}
"$python" -m http.server --bind 127.0.0.1 --directory viewer $((port + 1)) > /dev/null 2>&1 &
page=$!
"$python" -m vllm.entrypoints.openai.api_server "${flags[@]}" > out/try.log 2>&1 &
server=$!
trap 'kill $server $page 2> /dev/null || true' EXIT
echo "try: $model starts; what vLLM says is in out/try.log"
until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
    if ! kill -0 $server 2> /dev/null; then
        tail -n 5 out/try.log >&2
        echo "try: vLLM did not start; the lines above and out/try.log say why" >&2
        exit 1
    fi
    sleep 0.5
done
echo "try: open $link"
wait $server
