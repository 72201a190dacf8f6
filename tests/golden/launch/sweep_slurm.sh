#!/usr/bin/env bash
#SBATCH --job-name=rates
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=0-01:00:00
#SBATCH --array=0-2%2
#SBATCH --signal=TERM@300
#SBATCH --output=runs/sweeps/rates/slurm/%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue

set -u
folder=runs/sweeps/rates/slurm
case $SLURM_ARRAY_TASK_ID in
  0) command=(/opt/venv/bin/python -m onerec_jax.cli sweep point runs/sweeps/rates/learning_rate-0.001_a7d94c42/recipe.yaml) ;;
  1) command=(/opt/venv/bin/python -m onerec_jax.cli sweep point runs/sweeps/rates/learning_rate-0.002_da045fac/recipe.yaml) ;;
  2) command=(/opt/venv/bin/python -m onerec_jax.cli sweep point runs/sweeps/rates/learning_rate-0.004_6f646678/recipe.yaml) ;;
esac
first=$folder/$SLURM_JOB_ID.exit failures=$folder/$SLURM_JOB_ID.failures
rm -f "$first"
trap : TERM  # to be here when the processes have ended

srun --kill-on-bad-exit=1 --label bash -c 'trap : TERM; "$@"; code=$?
[ $code = 0 ] || (set -C; echo $code > "$0") 2> /dev/null
exit $code' "$first" "${command[@]}"
code=$?
[ ! -s "$first" ] || code=$(cat "$first")

# Neither success nor what would end the same way again; nor a job that Slurm itself ends or starts again.
case $code in 0 | 2 | 3) exit "$code" ;; esac
[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit "$code"

if [ "$code" != 6 ]; then
  echo "$code" >> "$failures"
  if [ "$(wc -l < "$failures")" -gt 10 ]; then
    echo "the job ended with exit code $code and was started again 10 times already" >&2
    exit "$code"
  fi
fi
[ "$code" != 4 ] || sleep 60
scontrol requeue "$SLURM_JOB_ID"
