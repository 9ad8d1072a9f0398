"""How loud a message is, besides logging's own levels."""

# What everybody wants to see of a run: stages, intervals, results. INFO is for `--verbose`.
NOTICE = 25
