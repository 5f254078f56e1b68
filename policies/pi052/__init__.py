"""pi052 and pi05: SigLIP and Gemma 2B read pictures and text, a 300M action expert turns noise into an action chunk.

In the order the data flows: config, gemma (the two towers), masks (who sees whom, where), model (prefix, expert step, text
step), flow (training draws), sampling (a chunk), policy (all of it behind Policy), checkpoint_keys (names in files),
lerobot_config. What SmolVLA shares is one level up: siglip (pictures to tokens), attention, text (tokens), losses, prompted
(samples to tensors), prompt (what is wanted of prompts), byte_prompts (a stand-in).
Why these are our own modules: docs/design/0012-pi052.md.
"""
