"""The dashboard: one local page that shows the fleet, and moves nothing."""
