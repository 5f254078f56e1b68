"""Training on Ray: data from the store, checkpoints, exact resume, publishing of versions."""
