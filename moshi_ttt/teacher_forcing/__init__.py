"""Real recordings read by the model: losses, loss against position and context, recall."""
