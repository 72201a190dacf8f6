"""The model room: pathways, encoder, decoder, experts and id tables.

Axis letters, the same everywhere:

    B requests      L events of a pathway   N context tokens       T targets of a request   C levels of a semantic ID
    D d_model       H heads                 K head width           F feed-forward width     V codes of a level
    E experts       M rows given to experts Y feedback labels      W beams                  G groups of blocks in a stack
"""
