#!/usr/bin/env bash
# vlv-stage1: 2 x v5p:4x4x8 (v5p-256), 64 host(s).
# Code 0123456789ab (sources 0123456789abcdef).
# Spot: about 30 s pass between the notice and the end. A save that takes longer is not finished,
# and the run resumes from the last regular one (run.save_every).
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
  gcloud alpha compute tpus queued-resources create vlv-stage1 --project=my-project \
    --zone=us-east5-b --node-count=2 --node-prefix=vlv-stage1 --accelerator-type=v5p-256 \
    --runtime-version=v2-alpha-tpuv5 --autocheckpoint-enabled --network=net --subnetwork=sub \
    --internal-ips --service-account=trainer@my-project.iam.gserviceaccount.com --spot
}
pause=30
back_off() {
  sleep "$pause"
  pause=$((pause * 2 < 600 ? pause * 2 : 600))
}
state() {  # absent where there is no such resource, unknown where that was not learned
  gcloud compute tpus queued-resources describe vlv-stage1 --project=my-project \
    --zone=us-east5-b '--format=value(state.state)' 2>"$stage/error" && return
  if grep -q NOT_FOUND "$stage/error"; then
    echo absent
  else
    cat "$stage/error" >&2
    echo unknown
  fi
}
wait_until_active() {
  local now
  while true; do
    now=$(state)
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDED) echo "the resource is $now" >&2; return 1 ;;
      unknown) back_off; continue ;;
    esac
    pause=30
    echo "waiting: $now"
    sleep 30
  done
}
install_and_start() {
  gcloud compute tpus tpu-vm scp "$stage/vlv-stage1.tar.gz" vlv-stage1-0: --project=my-project \
    --zone=us-east5-b --worker=all --tunnel-through-iap &&
  gcloud compute tpus tpu-vm ssh vlv-stage1-0 --project=my-project --zone=us-east5-b \
    --worker=all --tunnel-through-iap \
    '--command=umask 077 && tar -xzf vlv-stage1.tar.gz && rm vlv-stage1.tar.gz && bash vlv-stage1/setup.sh' &&
  gcloud compute tpus tpu-vm scp "$stage/vlv-stage1.tar.gz" vlv-stage1-1: --project=my-project \
    --zone=us-east5-b --worker=all --tunnel-through-iap &&
  gcloud compute tpus tpu-vm ssh vlv-stage1-1 --project=my-project --zone=us-east5-b \
    --worker=all --tunnel-through-iap \
    '--command=umask 077 && tar -xzf vlv-stage1.tar.gz && rm vlv-stage1.tar.gz && bash vlv-stage1/setup.sh'
}

started=no
while true; do
  case "$(state)" in
    unknown)
      back_off
      continue
      ;;
    absent)
      request || echo 'the request failed; trying again' >&2
      started=no
      ;;
    ACTIVE)
      if [ "$started" = no ]; then
        if install_and_start; then started=yes; else sleep 10; fi
        continue
      fi
      unit=$(gcloud compute tpus tpu-vm ssh vlv-stage1-0 --project=my-project --zone=us-east5-b \
        --worker=0 --tunnel-through-iap \
        '--command=if [ -e vlv-stage1/installed ]; then systemctl show vlv-stage1 --property=ActiveState --value; else echo missing; fi' || true)
      case "$unit" in
        inactive) echo 'the command is done'; break ;;
        missing) started=no ;;
        failed) echo 'the command failed too often; see its logs' >&2; exit 1 ;;
      esac
      ;;
    FAILED | SUSPENDED)
      echo 'the machines were taken away; asking for others'
      gcloud compute tpus queued-resources delete vlv-stage1 --project=my-project \
        --zone=us-east5-b --force --quiet || true
      started=no
      ;;
  esac
  pause=30
  sleep 60
done
