"""Decoders over the maps of a backbone: what is trained for a task."""
