"""Episodes as LeRobotDataset v3.0: crash-safe ingest, publishing, reading, sampling, DatasetService."""
