"""Vectors for people: `ThinkingEmbedder`, files of vectors, search, hard negatives.

The only engine that decides who thinks, lets them think together and reads vectors out; serving
and measuring both go through it. Refuses to know training, rewards and scores.
"""
