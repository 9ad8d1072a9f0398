"""The embedded default: emoji scenes and a tiny pretrained VLM."""
