"""How scenes are made from noise: the rectified flow, its losses, sampling."""
