"""The inference service, the weights service and the dashboard."""
