"""Meshes and the layout of every array on them."""
