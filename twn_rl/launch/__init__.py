"""What surrounds a run: its settings, its folder, its stages as processes.

The only room that reaches the embedded default (`twn_rl.demo`). Refuses to know what a stage does.
"""
