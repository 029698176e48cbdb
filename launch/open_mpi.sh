#!/usr/bin/env bash
# Trains on the GPUs of several machines that Open MPI reaches, one process for each GPU.
#
#   bash launch/open_mpi.sh [--config.KEY=VALUE ...]
#
# To stop it with a checkpoint, send SIGTERM to one of the processes of train.py, not to mpirun, which kills.
set -euo pipefail

: "${CONFIG:=configs/cait_s24.py}"
: "${WORKDIR:?a folder that all machines reach by this path}"
: "${DATA_DIR:?the folder of the TFDS data sets, on every machine}"
: "${HOSTS:?machines with their GPUs, the first one first: node1:8,node2:8}"
: "${PYTHON:=.venv/bin/python}" # by the same path on every machine
: "${PORT:=8476}"               # free on the first machine, and open to the others

cd "$(dirname "$0")/.."
first=${HOSTS%%[:,]*}

# JAX finds the processes of Open MPI 4 by itself, and not those of Open MPI 5: the form below suits both. Its
# variables are set by mpirun, so the inner shell reads them. Without JAX_LOCAL_DEVICE_IDS every process would
# take all GPUs of its machine.
# shellcheck disable=SC2016
exec mpirun --host "$HOSTS" --map-by slot --bind-to none bash -c '
  export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
  exec "$@" --processes="$OMPI_COMM_WORLD_SIZE" --process="$OMPI_COMM_WORLD_RANK"
' process "$PYTHON" train.py \
  --config="$CONFIG" --workdir="$WORKDIR" --config.data.data_dir="$DATA_DIR" \
  "$@" --coordinator="$first:$PORT"
