"""The letters of docstrings. Each has a length of its own, so that a swapped axis is another shape."""

B, b, N = 24, 6, 4  # Rows of a batch, those of each device, and the devices.
C = 7  # Captions in a block, and layers that read the image.
P, W, S = 8, 13, 19  # Image tokens, their width, and the side of an image; S also places in a cache.
Q, T, U = 9, 10, 12  # Queries, text tokens, and some more of these.
D, H, d, E, F = 48, 3, 16, 11, 17  # Width, its heads and their size, projection width, width of a feed-forward.
V, L, M, K = 31, 14, 28, 2  # Vocabulary; layers, width and key heads of a language model.
