"""Sizes of packed weights and of activations, as the compiled kernels and the code around them agree on."""

CCQ, INT4, INT8 = 0, 1, 2
"""Kinds of packed weights."""
CHUNK = 256
"""Input features in a chunk."""
CODE_BYTES = (64, 128, 256)
"""Bytes of a chunk of each kind."""
OFFSETS = (32, 8, 128)
"""What is added to the integers of each kind to make them unsigned."""
TABLE_BYTES = 1024
"""A codebook: for each of the four windows of a code, its value for all 256 bytes."""
CHUNK_BYTES = 640
"""A token's chunk of activations."""
HIGH, LOW, BASE, STEP = 0, 256, 512, 576
"""Where in it what stands; see `kernels.cpu.vector`."""
TOKENS = 4
"""Tokens that share a decoded chunk in registers: the sums of more don't fit beside the tables."""
TILE = 16
"""Output features in a task: few enough that the work of one expert can be shared out."""
BLOCK = 32
"""Chunks of activations, of all tokens of a step together, that all rows of a tile go through before the next ones:
20 KiB, which stay in a first-level cache of 32 beside the codes."""
