"""What a compiled step needs of a machine that nobody has to own: its traffic."""
