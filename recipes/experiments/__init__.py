"""Comparisons over seeds and arms, one file each: what is run and how it is told apart."""
