"""What surrounds a run: its settings, its folder, and comparisons of many runs as processes.

The only room that reaches the embedded default (`twn_rl.demo`). Refuses to know what a stage does.
"""
