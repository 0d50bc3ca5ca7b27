"""The weight cache: converted weights on disk, their keys and manifests, and the inventory of entries."""
