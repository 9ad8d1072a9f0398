"""One method a file: warm start, GRPO, adaptive control, latent thoughts, gate labels.

What they share lies beside them: losses, the target bank, the scorer of rollouts, checkpoints to
resume from. `thought_selection/` chooses which thoughts are worth teaching. Refuses to know how a
model is served or measured, and where a run's settings come from.
"""
