#!/usr/bin/env bash
# 2 process(es) on this machine, cpu:2x4. --execute also prefixes their lines,
# passes SIGTERM on to all, and ends the others when one dies.
env -u XLA_FLAGS PYTHONUNBUFFERED=1 LAUNCH_COMMIT=0123456789ab LAUNCH_SOURCES=0123456789abcdef JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS=127.0.0.1:12321 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python -m vlv_jax.train --config=configs/vlv_stage1.py:mini --workdir=/shared/runs/vlv-stage1 --config.run.steps=1000 &
env -u XLA_FLAGS PYTHONUNBUFFERED=1 LAUNCH_COMMIT=0123456789ab LAUNCH_SOURCES=0123456789abcdef JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS=127.0.0.1:12321 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 python -m vlv_jax.train --config=configs/vlv_stage1.py:mini --workdir=/shared/runs/vlv-stage1 --config.run.steps=1000 &
wait
