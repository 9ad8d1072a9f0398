"""The embedded default: emoji scenes and a tiny pretrained VLM; it knows nothing of adapters or training."""
