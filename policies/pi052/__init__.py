"""pi052 and pi05: SigLIP and Gemma 2B read pictures and text, a 300M action expert turns noise into an action chunk.

In the order the data flows: config, siglip (pictures to tokens), gemma (the two towers), masks (who sees whom, where),
model (prefix, expert step, text step), sampling (a chunk), text (tokens), losses, policy (all of it behind Policy; prompt
says what it wants of prompts, byte_prompts is a stand-in), checkpoint_keys (names in files), lerobot_config.
Why these are our own modules: docs/design/0012-pi052.md.
"""
