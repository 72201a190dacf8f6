"""The reward room: what a generated item is worth.

A reward is a pure function (request, candidates) -> float32 [B,G], with a name under which it is weighed in `rl.rewards` and
logged.

Axis letters as in `model/`, and G candidates of a request, Y labels of the reward model.
"""
