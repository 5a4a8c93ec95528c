"""Text to token files, as Megatron-LM's tools/preprocess_data.py writes them."""
