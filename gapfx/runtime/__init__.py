"""What trains a planned model: ranks, phases, masks that grow and are pruned, checkpoints."""
