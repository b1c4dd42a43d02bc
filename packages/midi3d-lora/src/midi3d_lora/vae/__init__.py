"""The set autoencoder of TripoSG: surface points to latents, latents to a field in space."""
