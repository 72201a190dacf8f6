#!/usr/bin/env bash
#SBATCH --job-name=quickstart
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=900G
#SBATCH --time=1-12:30:00
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --qos=high
#SBATCH --signal=TERM@120
#SBATCH --output=jobs/quickstart/%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --constraint=h100

set -u
export XLA_FLAGS='--a=b --c='"'"'d'"'"''
folder=jobs/quickstart
command=(/opt/venv/bin/python -m onerec_jax.cli pretrain jobs/quickstart/recipe.yaml)
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
  if [ "$(wc -l < "$failures")" -gt 3 ]; then
    echo "the job ended with exit code $code and was started again 3 times already" >&2
    exit "$code"
  fi
fi
[ "$code" != 4 ] || sleep 60
scontrol requeue "$SLURM_JOB_ID"
