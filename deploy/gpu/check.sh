#!/usr/bin/env bash
# The whole loop on a machine with a GPU: a model is made, vLLM serves it, a LoRA job trains, the adapter is loaded into the
# running engine, and chat answers through it. Prints what each step took.
#
#   deploy/gpu/check.sh              needs an NVIDIA GPU; vLLM goes into an environment of its own, once (several GB)
#   deploy/gpu/check.sh --cpu        the same steps on the CPU build of `make vllm`, with a small model
#   TUNEGATE_VLLM=/path/to/python    a vLLM that is installed already
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ "${1:-}" == "--cpu" ]]; then
    make setup
    TUNEGATE_VLLM="${TUNEGATE_VLLM:-$(python3 deploy/setup_vllm.py)}"
elif ! nvidia-smi --query-gpu=name,memory.total --format=csv,noheader; then
    echo "check: there is no NVIDIA GPU here (nvidia-smi says so); --cpu runs the same steps without one" >&2
    exit 2
else
    make setup
    if [[ -z "${TUNEGATE_VLLM:-}" ]]; then
        venv="${XDG_CACHE_HOME:-$HOME/.cache}/tunegate/vllm-gpu"
        TUNEGATE_VLLM="$venv/bin/python"
        if [[ ! -e "$venv/.ready" ]]; then
            python3 -m venv "$venv"
            "$TUNEGATE_VLLM" -m pip install --quiet "vllm==0.32.0"
            touch "$venv/.ready"
        fi
    fi
fi
export TUNEGATE_VLLM
exec .venv/bin/python -m deploy.gpu.check "$@"
