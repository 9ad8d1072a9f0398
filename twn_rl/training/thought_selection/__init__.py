"""Which of several thoughts a pair is taught (MMEmb-R1, 2604.06156). Knows no training."""
