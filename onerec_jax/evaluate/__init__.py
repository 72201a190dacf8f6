"""How good a ranking is: item-level metrics over the full catalogue, and the floors any model has to clear."""
