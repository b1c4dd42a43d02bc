"""Where prepared scenes come from: folders of meshes, 3D-FRONT, Objaverse."""
