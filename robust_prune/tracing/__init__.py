"""Which channels of a network can only be removed together: one traced forward pass."""
