"""The demo: the whole system on one machine, explained as it goes."""
