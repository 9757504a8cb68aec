#!/usr/bin/env bash
# vlv-stage1: v6e:4x4, 4 x ct6e-standard-4t.
# Code 0123456789ab (sources 0123456789abcdef).
set -euo pipefail
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir "$stage/vlv-stage1"
git archive --format=tar.gz --output="$stage/vlv-stage1/code.tar.gz" 0123456789ab
cat > "$stage/vlv-stage1/run.sh" <<'END_OF_FILE'
#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/code"
export PYTHONUNBUFFERED=1
export LAUNCH_COMMIT=0123456789ab
export LAUNCH_SOURCES=0123456789abcdef
# exec: SIGTERM must reach the trainer, not a shell that waits for it.
exec ../venv/bin/python -m vlv_jax.train --config=configs/vlv_stage1.py \
  --workdir=/shared/runs/vlv-stage1 --config.run.steps=1000
END_OF_FILE
cat > "$stage/vlv-stage1/setup.sh" <<'END_OF_FILE'
#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
rm -f installed
# What runs saves and ends before its code goes.
sudo systemctl stop vlv-stage1 2>/dev/null || true
rm -rf code && mkdir code && tar -xzf code.tar.gz -C code
if [ ! -x venv/bin/python ]; then
  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m venv venv
  else  # images with an older Python
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.11 venv
  fi
fi
venv/bin/python -m pip install --quiet -e './code[tpu]'
sed -e "s|@HOME@|$PWD|g" -e "s|@USER@|$(id -un)|g" vlv-stage1.service |
  sudo tee /etc/systemd/system/vlv-stage1.service >/dev/null
sudo systemctl daemon-reload
sudo systemctl enable --quiet vlv-stage1.service
sudo systemctl reset-failed vlv-stage1.service 2>/dev/null || true
sudo systemctl restart vlv-stage1.service
touch installed
END_OF_FILE
cat > "$stage/vlv-stage1/vlv-stage1.service" <<'END_OF_FILE'
[Unit]
Description=vlv_jax.train of the launch vlv-stage1
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=infinity
StartLimitBurst=11

[Service]
User=@USER@
ExecStart=/bin/bash @HOME@/run.sh
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=300
Restart=on-failure
RestartSec=20
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
END_OF_FILE
tar -czf "$stage/vlv-stage1.tar.gz" -C "$stage" vlv-stage1

request() {
  if ! gcloud compute resource-policies describe vlv-stage1 --project=my-project \
    --region=us-east5 >/dev/null 2>&1; then
    gcloud compute resource-policies create workload-policy vlv-stage1 --project=my-project \
      --region=us-east5 --type=HIGH_THROUGHPUT --accelerator-topology=4x4
  fi
  if ! gcloud compute instance-templates describe vlv-stage1 --project=my-project >/dev/null 2>&1; then
    gcloud compute instance-templates create vlv-stage1 --project=my-project \
      --machine-type=ct6e-standard-4t --image-project=ubuntu-os-accelerator-images \
      --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --maintenance-policy=TERMINATE \
      --boot-disk-size=200GB --scopes=cloud-platform --provisioning-model=SPOT \
      --instance-termination-action=DELETE
  fi
  if ! gcloud compute instance-groups managed describe vlv-stage1 --project=my-project \
    --zone=us-east5-b >/dev/null 2>&1; then
    gcloud compute instance-groups managed create vlv-stage1 --project=my-project \
      --zone=us-east5-b --template=vlv-stage1 --size=0 --target-size-policy-mode=bulk \
      --default-action-on-vm-failure=repair \
      --workload-policy=projects/my-project/regions/us-east5/resourcePolicies/vlv-stage1
  fi
  gcloud compute instance-groups managed resize vlv-stage1 --project=my-project \
    --zone=us-east5-b --size=4
}
hosts() {  # that run
  gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
    --zone=us-east5-b '--format=value(name)' --filter=instanceStatus=RUNNING
}
install_on() {
    gcloud compute scp "$stage/vlv-stage1.tar.gz" "$host:" --project=my-project \
      --zone=us-east5-b </dev/null &&
    gcloud compute ssh "$host" --project=my-project --zone=us-east5-b \
      '--command=umask 077 && tar -xzf vlv-stage1.tar.gz && rm vlv-stage1.tar.gz && bash vlv-stage1/setup.sh' </dev/null
}
install_and_start() {  # at once on all: they wait for each other
  local host pids=() pid
  for host in $(hosts); do
    install_on "$host" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || return 1
  done
}
wait_until_stable() {
  gcloud compute instance-groups managed wait-until vlv-stage1 --project=my-project \
    --zone=us-east5-b --stable
}

request
wait_until_stable
install_and_start || echo 'not everywhere; trying again'

# Spot: about 30 s pass between the notice and the end; see docs/launching.md.
states() {
  local host
  for host in $(hosts); do
    gcloud compute ssh "$host" --project=my-project --zone=us-east5-b \
      '--command=if [ -e vlv-stage1/installed ]; then systemctl show vlv-stage1 --property=ActiveState --value; else echo missing; fi' </dev/null || echo unreachable
  done | sort -u
}
renew() {  # in bulk mode an empty group is the only one that takes machines
  gcloud compute instance-groups managed resize vlv-stage1 --project=my-project \
    --zone=us-east5-b --size=0 &&
  gcloud compute instance-groups managed wait-until vlv-stage1 --project=my-project \
    --zone=us-east5-b --stable --timeout=600 &&
  gcloud compute instance-groups managed resize vlv-stage1 --project=my-project \
    --zone=us-east5-b --size=4
}
waited=0
while true; do
  sleep 60
  count=$(hosts | wc -l) || continue
  if [ "$count" -lt 4 ]; then
    waited=$((waited + 1))
    echo "$count of 4 hosts run"
    if [ "$waited" -ge 15 ]; then
      echo 'the group does not get them back; asking for all of them again'
      waited=0
      renew || continue
    fi
    continue
  fi
  waited=0
  case "$(states)" in
    inactive) echo 'the command is done'; break ;;
    # Bare machines first: on the others the command may have failed for want of them.
    *missing*) install_and_start || continue ;;
    *failed*) echo 'the command failed too often; see its logs' >&2; exit 1 ;;
  esac
done
