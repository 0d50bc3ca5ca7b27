"""Converted weights on the disk: keys, entries, manifests, and what there is."""
