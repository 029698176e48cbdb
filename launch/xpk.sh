#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster that xpk made: submits one workload.
#
#   bash launch/xpk.sh [--config.KEY=VALUE ...]
#
# The working tree is laid over the base image. STORAGE is what `xpk storage attach` or `xpk storage create` named.
set -euo pipefail

: "${PROJECT:?the project in Google Cloud}"
: "${CLUSTER:?the cluster}"
: "${STORAGE:?the storage attached to the cluster}"
: "${MOUNT:?its mount point}"
: "${ZONE:=us-east5-b}"
: "${NAME:=cait-s24}"
: "${TPU_TYPE:=v6e-16}"
: "${CONFIG:=configs/cait_s24.py}"
: "${WORKDIR:=$MOUNT/runs/cait_s24}"
: "${DATA_DIR:=$MOUNT/tensorflow_datasets}"

cd "$(dirname "$0")/.."
train=$(printf '%q ' python train.py --distributed \
  --config="$CONFIG" --workdir="$WORKDIR" --config.data.data_dir="$DATA_DIR" "$@")

# xpk's default image has Python 3.10. `exec` makes train.py the process that gets the SIGTERM of an eviction;
# it then has the grace period to save, and its status 130 is one after which xpk restarts.
exec xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$NAME" --tpu-type="$TPU_TYPE" --storage="$STORAGE" \
  --base-docker-image=python:3.12 --script-dir=. \
  --max-restarts=50 --termination-grace-period-seconds=300 \
  --command="pip install -c constraints.txt -e . 'jax[tpu]' && exec $train"
