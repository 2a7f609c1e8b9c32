"""Sizes of packed weights and of activations, as the compiled kernels and the code around them agree on."""

CCQ, INT4, INT8, LINE = 0, 1, 2, 3
"""Kinds of packed weights. LINE is CCQ with a codebook that takes no looking up: a code's word is ``(u a + b) >> 1``
of integers, as it is with the codebook of Dibit's own encoder."""
CHUNK = 256
"""Input features in a chunk."""
CODE_BYTES = (64, 128, 256, 64)
"""Bytes of a chunk of each kind."""
OFFSETS = (32, 8, 128, 32)
"""What is added to the integers of each kind to make them unsigned."""
TABLE_BYTES = 1088
"""A codebook: for each of the four windows of a code, its value for all 256 bytes; then `LINE`'s a and b."""
LINE_AT = 1024
CHUNK_BYTES = 1152
"""A token's chunk of activations."""
HIGH, LOW, BASE, STEP, WIDE = 0, 256, 512, 576, 640
"""Where in it what stands; see `kernels.cpu.vector`."""
WIDE_BYTES = 512
"""A chunk of decoded weights, or of activations, in 16 bits each."""
TILE = 16
"""Output features in a task: few enough that the work of one expert can be shared out."""
DIRECT = 2
"""Tokens of a matrix up to which its codes are decoded into registers for each token or two of them; more share what is
decoded into memory once."""
SPAN = 2
"""Chunks that are decoded at a time for those: 16 KiB of a tile, beside which the activations of two tokens have room
in a first-level cache of 32."""
PASS = 32
"""Tokens that go through decoded chunks one after the other, before the next ones are decoded."""
ROWS, PAIR = 4, 2
"""Output features and tokens whose sums stand in registers together."""
HALF_PANEL = 64
"""Input features that a product with 16-bit floating-point weights takes at a time."""
POSITIONS = 512
"""Positions of a context in a task of decode attention."""
SCORES = 64
"""Of them, those whose scores are kept at a time."""
