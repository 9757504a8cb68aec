#!/usr/bin/env bash
set -euo pipefail
expected=$(gcloud compute instance-groups managed describe vlv-stage1 --project=my-project \
  --zone=us-east5-b '--format=value(targetSize)')
gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
  --zone=us-east5-b
hosts=$(gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
  --zone=us-east5-b '--format=value(name)' --filter=instanceStatus=RUNNING)
for host in $hosts; do
  state=$(gcloud compute ssh "$host" --project=my-project --zone=us-east5-b \
    '--command=if [ -e vlv-stage1/installed ]; then systemctl show vlv-stage1 --property=ActiveState --value; else echo missing; fi' </dev/null) || state=unreachable
  echo "$host: $state"
done
present=$(echo "$hosts" | wc -w)
echo "$present of $expected hosts run"
[ "$present" -eq "$expected" ]
