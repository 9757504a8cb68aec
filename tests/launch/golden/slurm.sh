#!/usr/bin/env bash
#SBATCH --job-name=vlv-stage1
#SBATCH --partition=gpu
#SBATCH --time=2-00:00:00
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@300
#SBATCH --output=vlv-stage1-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# vlv-stage1: 4 x h200:8.
# Code 0123456789ab (sources 0123456789abcdef): the checkout must be that, or the tasks stop.
set -uo pipefail
: "${HF_TOKEN:?set HF_TOKEN in the environment}"
log_folder=$PWD  # where the job was submitted
cd /shared/code || exit 1
export PYTHONUNBUFFERED=1
export LAUNCH_COMMIT=0123456789ab
export LAUNCH_SOURCES=0123456789abcdef
export JAX_PLATFORMS=cuda
# One that fails ends all: the others would wait for it.
srun --label --kill-on-bad-exit=1 python -m vlv_jax.train --config=configs/vlv_stage1.py \
  --workdir=/shared/runs/vlv-stage1 --config.run.steps=1000
status=$?
again() {  # a job whose script still runs is in these states if somebody has ended it
  case "$(scontrol show job "$SLURM_JOB_ID")" in
    *JobState=CANCELLED* | *JobState=COMPLETING*) ;;
    *) scontrol requeue "$SLURM_JOB_ID" ;;
  esac
}
failures="$log_folder/vlv-stage1-$SLURM_JOB_ID.failures"
if [ "$status" -eq 0 ]; then
  rm -f "$failures"
elif [ "$status" -eq 143 ]; then
  # It has saved because its time is over or the nodes are wanted; it goes on later.
  again
else
  echo "failed with status $status" >>"$failures"
  if [ "$(wc -l <"$failures")" -le 10 ]; then
    again
  fi
fi
exit "$status"
