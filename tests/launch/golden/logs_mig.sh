#!/usr/bin/env bash
set -euo pipefail
for host in $(gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
  --zone=us-east5-b '--format=value(name)'); do
  gcloud compute ssh "$host" --project=my-project --zone=us-east5-b \
    '--command=journalctl --unit=vlv-stage1 --output=cat --lines=200 --follow' </dev/null | sed "s/^/[$host] /" &
done
wait
