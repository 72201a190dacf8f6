"""The post-training room: RSFT, rollouts, objectives and the loop that joins them.

Axis letters as in `model/`, and G candidates of a request.
"""
