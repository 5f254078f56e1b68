"""SmolVLA2 and SmolVLA: SmolVLM2-500M reads pictures, text and the state, a thin expert turns noise into an action chunk.

In the order the data flows: config, connector (picture features to tokens), llama (the two towers), masks (who sees whom,
where), model (prefix, expert step, text step), losses, policy (all of it behind Policy), checkpoint_keys (names in files),
lerobot_config. Vision tower, attention, text decoding and prompts are shared with pi052: policies/.
Why these are our own modules: docs/design/0012-pi052.md; what is particular here: docs/design/0014-smolvla2.md.
"""
