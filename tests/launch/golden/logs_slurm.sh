#!/usr/bin/env bash
set -euo pipefail
tail --lines=200 --follow=name vlv-stage1-*.log
