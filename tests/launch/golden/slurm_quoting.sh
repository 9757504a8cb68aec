#!/usr/bin/env bash
#SBATCH --job-name=vlv-stage1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@300
#SBATCH --output=vlv-stage1-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# vlv-stage1: 1 x h100:4.
# Code 0123456789ab (sources 0123456789abcdef): the checkout must be that, or the tasks stop.
set -uo pipefail
log_folder=$PWD  # where the job was submitted
cd '/shared/my code' || exit 1
export PYTHONUNBUFFERED=1
export LAUNCH_COMMIT=0123456789ab
export LAUNCH_SOURCES=0123456789abcdef
export NOTE='a b'"'"'c $(d)'
export JAX_PLATFORMS=cuda
# One that fails ends all: the others would wait for it.
srun --label --kill-on-bad-exit=1 'my env/python' -m vlv_jax.train \
  --config=configs/vlv_stage1.py '--workdir=/bucket/it'"'"'s $HOME; a "run"' \
  --config.run.steps=1000
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
