"""Prompts: what a policy reads as tokens, in training and in service, and how its words are read back.

messages (what is said, for every kind of prompt), tokenizer (text to ids), locations (answers about pictures), pi052 and
smolvla (each policy's way of writing messages down).
"""
