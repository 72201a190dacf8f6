"""Scaling laws: families of models, sweeps over them, and fits of what the runs give."""
