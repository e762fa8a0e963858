"""Where the events of a run are shown beside metrics.jsonl: TensorBoard and Weights & Biases, by their own writers.

`points` reads events into named numbers and texts, `writer` says what a writer is, `offering` gives each every event.
"""
