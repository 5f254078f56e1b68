"""Topologies: the whole system on one machine, and the demo that shows it."""
