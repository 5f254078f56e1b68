"""The control loop of one robot: chunk queue, real-time chunking, recording with a spool. No torch."""
