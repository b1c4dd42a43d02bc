"""Annotated pictures: files, masks and their encodings, COCO, and what is wrong with them."""
