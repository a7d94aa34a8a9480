"""The model talking: prompts, users, and the loop over `LMGen`."""
