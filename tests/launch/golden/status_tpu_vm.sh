#!/usr/bin/env bash
set -euo pipefail
gcloud compute tpus queued-resources describe vlv-stage1 --project=my-project \
  --zone=us-east5-b
gcloud compute tpus tpu-vm ssh vlv-stage1-0 --project=my-project --zone=us-east5-b \
  --worker=all \
  '--command=if [ -e vlv-stage1/installed ]; then systemctl show vlv-stage1 --property=ActiveState --value; else echo missing; fi'
gcloud compute tpus tpu-vm ssh vlv-stage1-1 --project=my-project --zone=us-east5-b \
  --worker=all \
  '--command=if [ -e vlv-stage1/installed ]; then systemctl show vlv-stage1 --property=ActiveState --value; else echo missing; fi'
