#!/usr/bin/env bash
set -euo pipefail
kubectl logs --namespace=default \
  --selector=jobset.sigs.k8s.io/jobset-name=vlv-stage1,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0 \
  --container=trainer --tail=200 --follow
