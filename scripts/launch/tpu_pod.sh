#!/usr/bin/env bash
# Trains on all hosts of a TPU pod slice:
#
#   scripts/launch/tpu_pod.sh NAME ZONE --config=configs/cifar_vit.py --workdir=/mnt/shared/run
#
# NAME and ZONE are those of `gcloud compute tpus tpu-vm list`; what follows are flags of gnp.train.
# Expected on every host, set up once by `gcloud compute tpus tpu-vm ssh … --worker=all --command=…`:
# - this repository in ~/gnp, or in GNP_DIR=DIRECTORY, which is relative to the home directory,
#   with its environment: `python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'`;
# - the data under the same path;
# - a work directory on storage that all hosts see under one path, such as an NFS share.
#
# The run ends if this command loses its connection: keep it in tmux or screen. To stop it with the
# state saved, from another terminal:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="pkill -TERM -f '[g]np[.]train'"
#
# To continue it, run the same command again.
set -euo pipefail

if (($# < 4)); then
  echo "usage: $0 NAME ZONE --config=FILE.py --workdir=DIRECTORY [FLAG ...]" >&2
  exit 2
fi
name=$1
zone=$2
shift 2

# Quoted for the shell of the hosts, which reads the command as one string.
printf -v directory '%q' "${GNP_DIR:-gnp}"
printf -v flags ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $directory && exec .venv/bin/python -m gnp.train --distributed$flags"
