#!/usr/bin/env bash
set -euo pipefail
kubectl get jobset vlv-stage1 --namespace=default
kubectl get jobs,pods --namespace=default --selector=jobset.sigs.k8s.io/jobset-name=vlv-stage1 \
  --output=wide
