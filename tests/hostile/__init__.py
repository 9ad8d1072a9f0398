"""Campaigns of hostile inputs and of faults: generated, seeded, each case judged and counted.

A quick subset runs with all other tests; `make hostile` runs everything (tests marked `campaign`
included) and prints the table of `table`.
"""
