"""The embedded default: emoji scenes, a tiny pretrained VLM, and a reverse dictionary.

Pictures and words in, records out, and the backbone's own pretraining. Refuses to know adapters,
thoughts that are learned, and how any of it is trained or measured.
"""
