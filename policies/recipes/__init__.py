"""Recipes: which messages a frame's language annotations become, and which of them are learnt.

annotations (rows of a frame, and how a binding finds one), recipe (the YAML language, checked on reading), render (messages
of one frame). What a policy makes of the messages is in policies/prompts.
"""
