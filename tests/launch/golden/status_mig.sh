#!/usr/bin/env bash
set -euo pipefail
gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
  --zone=us-east5-b
for host in $(gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
  --zone=us-east5-b '--format=value(name)'); do
  gcloud compute ssh "$host" --project=my-project --zone=us-east5-b \
    '--command=if [ -e vlv-stage1/run.sh ]; then systemctl show vlv-stage1 --property=ActiveState --value; else echo missing; fi' </dev/null || true
done
