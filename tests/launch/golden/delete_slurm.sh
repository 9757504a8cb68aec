#!/usr/bin/env bash
set -euo pipefail
scancel --me --name=vlv-stage1
