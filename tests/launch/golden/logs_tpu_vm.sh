#!/usr/bin/env bash
set -euo pipefail
gcloud compute tpus tpu-vm ssh vlv-stage1-0 --project=my-project --zone=us-east5-b --worker=0 \
  '--command=journalctl --unit=vlv-stage1 --output=cat --lines=200 --follow'
