"""What one data holder does: its model, data, adapter and local training."""
