"""What Isaac says: the tags in answers, how right they are, and how they look on the picture."""
