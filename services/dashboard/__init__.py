"""The dashboard: one local page that shows the fleet. It moves no robot, stops them, and swaps weights where allowed."""
