"""The parts of `twn_rl.encode.ThinkingEmbedder`: inputs, schedule, results. Knows no files."""
