#!/usr/bin/env bash
set -euo pipefail
kubectl delete jobset vlv-stage1 --namespace=default --ignore-not-found
kubectl delete secret vlv-stage1-secrets --namespace=default --ignore-not-found
