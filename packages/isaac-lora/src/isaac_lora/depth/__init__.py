"""How near each place of a picture is, estimated by Depth-Anything-V2 and coded for the decoder."""
