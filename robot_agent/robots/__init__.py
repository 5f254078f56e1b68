"""One file per robot; registry.py names them."""
