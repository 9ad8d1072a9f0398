"""What every long piece of work stands on: processes, whole files, shards.

Processes of one launch in step (also under DeepSpeed ZeRO), files that are whole or absent, and
passes over rows that are shared by processes and go on after a kill; what is wrong with settings,
told at once. Refuses to know what the rows are: no records, no tensors of a model, no losses.
"""
