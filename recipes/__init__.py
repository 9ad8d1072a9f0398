"""The stages of a run, one script each; `accelerate launch` starts those that train."""
