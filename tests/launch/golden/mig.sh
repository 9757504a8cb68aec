#!/usr/bin/env bash
# vlv-stage1: v6e:2x4, 1 x ct6e-standard-8t.
# Code 0123456789ab (sources 0123456789abcdef).
set -euo pipefail
: "${HF_TOKEN:?set HF_TOKEN in the environment}"
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
  --workdir=/bucket/runs/vlv-stage1 --config.run.steps=1000
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
if ! command -v gcsfuse >/dev/null; then
  echo "gcsfuse is missing on this image: install it (docs/launching.md)" >&2
  exit 1
fi
# Nobody but its user can touch a mounted bucket, and nobody at all a dead one.
sudo systemctl stop launch-bucket.service 2>/dev/null || true
sudo umount --lazy /bucket 2>/dev/null || true
sudo mkdir -p /bucket
sudo chown "$(id -u):$(id -g)" /bucket
sed -e "s|@HOME@|$PWD|g" -e "s|@USER@|$(id -un)|g" launch-bucket.service |
  sudo tee /etc/systemd/system/launch-bucket.service >/dev/null
sed -e "s|@HOME@|$PWD|g" -e "s|@USER@|$(id -un)|g" vlv-stage1.service |
  sudo tee /etc/systemd/system/vlv-stage1.service >/dev/null
sudo systemctl daemon-reload
sudo systemctl enable --quiet launch-bucket.service
sudo systemctl reset-failed launch-bucket.service 2>/dev/null || true
sudo systemctl restart launch-bucket.service
sudo systemctl enable --quiet vlv-stage1.service
sudo systemctl reset-failed vlv-stage1.service 2>/dev/null || true
sudo systemctl restart vlv-stage1.service
touch installed
END_OF_FILE
cat > "$stage/vlv-stage1/vlv-stage1.service" <<'END_OF_FILE'
[Unit]
Description=vlv_jax.train of the launch vlv-stage1
Wants=network-online.target launch-bucket.service
After=network-online.target launch-bucket.service
StartLimitIntervalSec=infinity
StartLimitBurst=11

[Service]
User=@USER@
ExecStartPre=/bin/bash -c 'until mountpoint -q /bucket && stat -t /bucket/. >/dev/null; do sleep 1; done'
TimeoutStartSec=300
ExecStart=/bin/bash @HOME@/run.sh
EnvironmentFile=@HOME@/secrets.env
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=300
Restart=on-failure
RestartSec=20
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
END_OF_FILE
cat > "$stage/vlv-stage1/launch-bucket.service" <<'END_OF_FILE'
[Unit]
Description=the bucket my-bucket at /bucket
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=@USER@
ExecStartPre=-+/usr/bin/umount --lazy /bucket
ExecStart=/usr/bin/env gcsfuse --foreground --implicit-dirs my-bucket /bucket
ExecStartPost=/bin/bash -c 'until mountpoint -q /bucket && stat -t /bucket/. >/dev/null; do sleep 1; done'
ExecStopPost=-+/usr/bin/umount --lazy /bucket
Restart=always
RestartSec=5
TimeoutStartSec=60

[Install]
WantedBy=multi-user.target
END_OF_FILE
# Values go by a file that only you can read, never by a command line.
(umask 077 && : > "$stage/vlv-stage1/secrets.env")
case "$HF_TOKEN" in
  *[!A-Za-z0-9._~+/=:@-]*)
    echo "HF_TOKEN has a character that systemd would change" >&2
    exit 1
    ;;
esac
printf 'HF_TOKEN=%s\n' "$HF_TOKEN" >> "$stage/vlv-stage1/secrets.env"
tar -czf "$stage/vlv-stage1.tar.gz" -C "$stage" vlv-stage1

request() {
  if ! gcloud compute instance-templates describe vlv-stage1 --project=my-project >/dev/null 2>&1; then
    gcloud compute instance-templates create vlv-stage1 --project=my-project \
      --machine-type=ct6e-standard-8t --image-project=ubuntu-os-accelerator-images \
      --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --maintenance-policy=TERMINATE \
      --boot-disk-size=200GB --scopes=cloud-platform --network=net --subnet=sub --no-address \
      --service-account=trainer@my-project.iam.gserviceaccount.com
  fi
  if ! gcloud compute instance-groups managed describe vlv-stage1 --project=my-project \
    --zone=us-east5-b >/dev/null 2>&1; then
    gcloud compute instance-groups managed create vlv-stage1 --project=my-project \
      --zone=us-east5-b --template=vlv-stage1 --size=0 --target-size-policy-mode=bulk \
      --default-action-on-vm-failure=repair
  fi
  gcloud compute instance-groups managed resize vlv-stage1 --project=my-project \
    --zone=us-east5-b --size=1
}
hosts() {  # that run
  gcloud compute instance-groups managed list-instances vlv-stage1 --project=my-project \
    --zone=us-east5-b '--format=value(name)' --filter=instanceStatus=RUNNING
}
install_on() {
    gcloud compute scp "$stage/vlv-stage1.tar.gz" "$host:" --project=my-project \
      --zone=us-east5-b --tunnel-through-iap </dev/null &&
    gcloud compute ssh "$host" --project=my-project --zone=us-east5-b --tunnel-through-iap \
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
install_and_start
echo 'started; follow it by: python -m launch logs mig --name=vlv-stage1 ...'
