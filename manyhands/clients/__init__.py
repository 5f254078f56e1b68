"""Typed clients, one module per area: deadlines on every call, retries only where the contract says idempotent."""
