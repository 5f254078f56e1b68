"""The inference service: one policy process serving many robots."""
