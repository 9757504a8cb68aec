#!/usr/bin/env bash
set -euo pipefail
hosts=$(gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
  --zone=us-east5-b '--format=value(name)' --filter=instanceStatus=RUNNING)
for host in $hosts; do
  gcloud compute ssh "$host" --project=my-project --zone=us-east5-b \
    '--command=journalctl --unit=vlv-stage1 --output=cat --lines=200 --follow' </dev/null | sed "s/^/[$host] /" &
done
wait
