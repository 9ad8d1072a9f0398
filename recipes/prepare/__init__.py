"""What is made once before a run: backbones and records."""
