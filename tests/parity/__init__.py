"""Policies against golden fixtures computed with the references."""
