"""One frozen backbone, two LoRA adapters, read-out tokens and a routing gate.

From chat messages to thoughts and vectors: collating, caches, generation, reading states out,
checkpoints, and the fingerprint of everything a vector depends on. Refuses to know how any of it
is trained, served or measured.
"""
