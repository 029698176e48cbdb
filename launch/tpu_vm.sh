#!/usr/bin/env bash
# Trains on a slice of TPUs in Google Cloud: asks for it, waits, installs, starts.
#
#   bash launch/tpu_vm.sh [--config.KEY=VALUE ...]
#
# The committed state of this repository is what runs. Call it again after a preemption: it asks for a new slice,
# and the run goes on from the newest checkpoint on the share. It deletes nothing that still runs:
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --project=PROJECT --force
set -euo pipefail

: "${PROJECT:?the project in Google Cloud}"
: "${SHARE:?an NFS share, such as a Filestore instance: 10.0.0.2:/share}"
: "${ZONE:=us-east5-b}"
: "${NAME:=cait}"
: "${ACCELERATOR:=v6e-16}"
: "${RUNTIME:=v2-alpha-tpuv6e}" # v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p
: "${PRICE:=--spot}"            # --reserved, or --guaranteed
: "${MOUNT:=/mnt/cait}"         # where every machine of the slice mounts the share
: "${CONFIG:=configs/cait_s24.py}"
: "${WORKDIR:=$MOUNT/runs/cait_s24}"
: "${DATA_DIR:=$MOUNT/tensorflow_datasets}"

cd "$(dirname "$0")/.."
place=(--zone="$ZONE" --project="$PROJECT")

state() {
  gcloud compute tpus queued-resources list "${place[@]}" \
    --filter="name ~ \"/$NAME\$\"" --format="value(state.state)"
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

case $(state) in
  SUSPENDED | FAILED) gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet ;;
esac
if [[ -z $(state) ]]; then
  gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "$PRICE"
fi
until [[ $(state) == ACTIVE ]]; do
  if [[ $(state) == FAILED ]]; then
    echo "the request failed: gcloud compute tpus queued-resources describe $NAME ${place[*]}" >&2
    exit 1
  fi
  sleep 30
done

# The images have Python 3.10, and 3.11 or later is needed: uv brings one.
code=$(mktemp -d)
trap 'rm -r "$code"' EXIT
git archive --prefix=cait/ --output="$code/cait.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$code/cait.tar.gz" "$NAME": "${place[@]}" --worker=all
on_all "set -e
  tar -xzf cait.tar.gz
  curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv venv --allow-existing --python 3.12 venv
  ~/.local/bin/uv pip install --python venv -c cait/constraints.txt -e cait 'jax[tpu]'
  sudo apt-get install -y nfs-common
  sudo mkdir -p $MOUNT
  mountpoint -q $MOUNT || sudo mount -t nfs $SHARE $MOUNT
  sudo install -d -m 777 $WORKDIR"

# As a service of systemd the run outlives this connection, and gets a SIGTERM when a machine is shut down.
on_all "sudo systemd-run --unit=cait --collect --uid=\$(id -u) --working-directory=\$HOME/cait \
  -p KillMode=mixed -p TimeoutStopSec=300 -p SuccessExitStatus=130 \
  \$HOME/venv/bin/python train.py --distributed $(printf '%q ' \
    --config="$CONFIG" --workdir="$WORKDIR" --config.data.data_dir="$DATA_DIR" "$@")"

echo "to watch it: gcloud compute tpus tpu-vm ssh $NAME ${place[*]} --command='sudo journalctl -fu cait'"
echo "to stop it with a checkpoint: ... --worker=all --command='sudo systemctl stop cait'"
