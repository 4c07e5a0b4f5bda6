"""torch's graph of a model: traced, canonical, its units, edges and channels, compared with the module."""
