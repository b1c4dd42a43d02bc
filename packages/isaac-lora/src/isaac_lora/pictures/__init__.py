"""From a picture of any size to the vision tower's patches."""
