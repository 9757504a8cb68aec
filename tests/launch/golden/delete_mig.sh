#!/usr/bin/env bash
set -euo pipefail
hosts=$(gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
  --zone=us-east5-b '--format=value(name)' --filter=instanceStatus=RUNNING) || hosts=
for host in $hosts; do
  gcloud compute ssh "$host" --project=my-project --zone=us-east5-b \
    '--command=sudo systemctl stop vlv-stage1' </dev/null || true
done
gcloud compute instance-groups managed delete vlv-stage1 --project=my-project \
  --zone=us-east5-b --quiet
gcloud compute instance-templates delete vlv-stage1 --project=my-project --quiet
# A single host has no policy.
gcloud compute resource-policies delete vlv-stage1 --project=my-project --region=us-east5 \
  --quiet || true
