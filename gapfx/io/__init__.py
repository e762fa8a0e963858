"""Files of models: sparse ones (`model.gapfx`), and conversions from and to dense safetensors and other forms."""
