"""From item content to semantic IDs.

Axis letters: I items, N rows, D width of a vector, K codes of one codebook, L levels of the quantizer, C levels of a
semantic ID (L, or L + 1 with the level that tells items of one ID apart).
"""
