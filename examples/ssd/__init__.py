"""SSD in plain torch, for examples/detection.py."""
