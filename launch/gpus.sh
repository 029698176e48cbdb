#!/usr/bin/env bash
# Trains on all GPUs of one machine, in one process.
#
#   bash launch/gpus.sh [--config.KEY=VALUE ...]
#
# Ctrl-C and SIGTERM save and end it with status 130; the same command goes on from there.
set -euo pipefail

: "${CONFIG:=configs/cait_s24.py}"
: "${WORKDIR:=runs/cait_s24}"
: "${DATA_DIR:?the folder of the TFDS data sets}"
: "${CUDA:=cuda13}" # cuda12 where the driver is too old for CUDA 13

cd "$(dirname "$0")/.."
if [[ ! -d .venv ]]; then
  python3 -m venv .venv
  .venv/bin/pip install -c constraints.txt -e . "jax[$CUDA]"
fi
exec .venv/bin/python train.py \
  --config="$CONFIG" --workdir="$WORKDIR" --config.data.data_dir="$DATA_DIR" "$@"
