"""Comparisons over arms and seeds, one file each: which stages run, and what is told apart."""
