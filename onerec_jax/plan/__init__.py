"""What a step costs on a machine that nobody has to own: memory, FLOPs, traffic, collectives, bounds."""
