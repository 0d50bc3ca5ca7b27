"""The paged KV cache of a stage: which blocks a slot has, what they hold, and the tiers beside the device."""
