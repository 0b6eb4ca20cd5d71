"""vico_pl: train multimodal language models to spend vision tokens where the meaning is."""
