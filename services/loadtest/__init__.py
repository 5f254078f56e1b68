"""Simulated robots against a running inference service: what people size their GPU with."""
