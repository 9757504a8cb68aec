#!/usr/bin/env bash
# vlv-stage1: 1 x v5e:16x16 (v5litepod-256), 64 host(s).
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
  gcloud alpha compute tpus queued-resources create vlv-stage1 --project=my-project \
    --zone=us-east5-b --node-id=vlv-stage1 --accelerator-type=v5litepod-256 \
    --runtime-version=v2-alpha-tpuv5-lite --autocheckpoint-enabled
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
  gcloud compute tpus tpu-vm scp "$stage/vlv-stage1.tar.gz" vlv-stage1: --project=my-project \
    --zone=us-east5-b --worker=all &&
  gcloud compute tpus tpu-vm ssh vlv-stage1 --project=my-project --zone=us-east5-b \
    --worker=all \
    '--command=umask 077 && tar -xzf vlv-stage1.tar.gz && rm vlv-stage1.tar.gz && bash vlv-stage1/setup.sh'
}

while now=$(state) && [ "$now" = unknown ]; do
  back_off
done
if [ "$now" = absent ]; then
  request
fi
wait_until_active
install_and_start
echo 'started; follow it by: python -m launch logs tpu_vm --name=vlv-stage1 ...'
