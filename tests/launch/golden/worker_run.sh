#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/code"
export PYTHONUNBUFFERED=1
export LAUNCH_COMMIT=0123456789ab
export LAUNCH_SOURCES=0123456789abcdef
# exec: SIGTERM must reach the trainer, not a shell that waits for it.
exec ../venv/bin/python -m vlv_jax.train --config=configs/vlv_stage1.py \
  --workdir=/bucket/runs/vlv-stage1 --config.run.steps=1000
