"""What the choice of a backend stands on: the device's properties, digests of the sources, tables and the cache."""
