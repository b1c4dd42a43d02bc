"""From a picture and a map of its instances to what the transformer is conditioned on."""
