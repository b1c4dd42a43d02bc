"""From conversations in JSON to the model's sequences and labels."""
