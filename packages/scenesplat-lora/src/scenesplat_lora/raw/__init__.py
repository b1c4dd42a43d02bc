"""ScanNet, ScanNet++ and Matterport3D as their authors distribute them."""
