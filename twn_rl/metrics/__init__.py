"""Arithmetic of retrieval and of probabilities, on plain arrays.

Ranks, graded metrics, margins over negatives, calibration, and how sure each of them is. Refuses
to know where numbers come from: no records, no models, no files.
"""
