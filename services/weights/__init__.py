"""The weights service: versions of policies, content-addressed, from learners to whoever serves them."""
