#!/usr/bin/env bash
set -euo pipefail
squeue --me --name=vlv-stage1 --long
