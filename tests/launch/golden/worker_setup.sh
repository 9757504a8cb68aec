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
