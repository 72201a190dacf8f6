"""Training jobs on this machine, under Slurm and on GKE."""
