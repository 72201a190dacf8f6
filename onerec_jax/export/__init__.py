"""The export room: from a run to a directory that other programs load, without this package."""
