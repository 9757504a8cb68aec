#!/usr/bin/env bash
set -euo pipefail
gcloud compute tpus tpu-vm ssh vlv-stage1-0 --project=my-project --zone=us-east5-b \
  --worker=all '--command=sudo systemctl stop vlv-stage1' || true
gcloud compute tpus tpu-vm ssh vlv-stage1-1 --project=my-project --zone=us-east5-b \
  --worker=all '--command=sudo systemctl stop vlv-stage1' || true
gcloud compute tpus queued-resources delete vlv-stage1 --project=my-project --zone=us-east5-b \
  --force --quiet
