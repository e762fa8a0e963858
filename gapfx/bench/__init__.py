"""Times a task's own layers and whole model on this machine: dense, and with each way to run sparse weights."""
